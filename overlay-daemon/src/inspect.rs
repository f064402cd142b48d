//! `overlay-daemon token inspect`: what a capability token says, whom it is for and how long it
//! still holds. Decides how that is told. Grants nothing, and never shows the token itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use overlay_core::frame::MAX_CAP;
use overlay_core::grant::{CLOCK_SKEW_MS, Claims, LOCAL_HOLDER};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

use crate::kms;

/// Bytes of the input: a token, with room for white space and for telling that it is too long.
const MAX_INPUT: u64 = 64 * 1024;

/// `overlay-daemon token inspect`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct InspectArgs {
    /// The file that holds the token; - for standard input [env: OVERLAY_TOKEN_FILE] [default: -]
    #[arg(value_name = "FILE|-")]
    pub file: Option<PathBuf>,
    /// Check the signature too, with this JSON Web Key Set (a daemon's token.keys)
    #[arg(long, value_name = "JWKS")]
    pub keys: Option<PathBuf>,
}

const HELP: &str = "\
Prints the token's header and claims, what they allow, and the times in RFC 3339. The token
itself is never printed. Without --keys the signature is not looked at: anyone can write what
is shown then.

Examples:
  overlay-daemon token inspect /run/overlay/token
  kubectl get secret mesh-token -o jsonpath='{.data.peer}' | base64 -d | overlay-daemon token inspect -
  overlay-daemon token inspect token --keys /etc/overlay/token/token-keys.json

Exit code: 0 a token that can be read, also one that has expired, and with --keys one whose
signature holds; 1 anything else; 2 usage.";

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It cannot be read.
    #[error("{name}: cannot be read: {source}")]
    Read {
        /// The file, or standard input.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It is no token, or one that no daemon takes.
    #[error("{name}: {message}")]
    Invalid {
        /// The file, or standard input.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// The key set cannot be used.
    #[error("--keys: {0}")]
    Keys(String),
    /// Nobody took what was shown.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

/// A token's header, as far as daemons take one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: Option<String>,
    kid: Option<String>,
}

/// Shows a token at `unix_ms`, milliseconds since 1970. Whether all is well with it, as far as
/// was asked.
///
/// # Errors
/// It cannot be read, or it is no token.
pub fn inspect(args: &InspectArgs, unix_ms: u64, out: &mut impl Write) -> Result<bool, InspectError> {
    let path = args.file.clone().or_else(|| std::env::var_os("OVERLAY_TOKEN_FILE").map(PathBuf::from));
    let path = path.filter(|path| path.as_os_str() != "-");
    let name = path.as_ref().map_or_else(|| "standard input".to_owned(), |path| path.display().to_string());
    let text = read(path.as_deref()).map_err(|source| InspectError::Read { name: name.clone(), source })?;
    let invalid = |message| InspectError::Invalid { name: name.clone(), message };
    let token = text.trim_ascii();
    let (header, claims) = parse(token).map_err(invalid)?;
    let signature = args.keys.as_deref().map(|path| verify(path, token)).transpose()?;
    let shown = show(&header, &claims, signature.as_ref(), unix_ms);
    match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(signature.is_none_or(|verdict| verdict.is_ok())),
    }
}

fn read(path: Option<&Path>) -> io::Result<Zeroizing<Vec<u8>>> {
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_INPUT as usize + 1));
    match path {
        Some(path) => File::open(path)?.take(MAX_INPUT + 1).read_to_end(&mut text)?,
        None => io::stdin().lock().take(MAX_INPUT + 1).read_to_end(&mut text)?,
    };
    Ok(text)
}

fn parse(token: &[u8]) -> Result<(Header, Claims), String> {
    if token.is_empty() {
        return Err("is empty, must hold a token".to_owned());
    }
    if token.len() > MAX_CAP {
        return Err(format!("holds more than the {MAX_CAP} bytes that a token has at most"));
    }
    let parts: Vec<&[u8]> = token.split(|byte| *byte == b'.').collect();
    let [header, claims, _] = parts[..] else {
        return Err("does not hold a token (three base64url parts joined by dots)".to_owned());
    };
    Ok((member("header", header)?, member("claims", claims)?))
}

/// A part of a token. What the parser says of it may quote a value, which is shown anyway.
fn member<T: for<'a> Deserialize<'a>>(what: &str, part: &[u8]) -> Result<T, String> {
    let json =
        URL_SAFE_NO_PAD.decode(part).map_err(|_| format!("the token's {what} are not base64url without padding"));
    serde_json::from_slice(&json?).map_err(|error| {
        let said: String = error.to_string().chars().filter(|c| !c.is_control()).collect();
        format!("the token's {what} are not what a daemon takes: {said}")
    })
}

fn verify(path: &Path, token: &[u8]) -> Result<Result<(), &'static str>, InspectError> {
    kms::verify_signature(path, token).map_err(|error| InspectError::Keys(error.to_string()))
}

fn show(header: &Header, claims: &Claims, signature: Option<&Result<(), &'static str>>, unix_ms: u64) -> String {
    let printable = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let seconds = unix_ms / 1_000;
    let holder = match claims.sub.as_str() {
        LOCAL_HOLDER => "local: whoever reaches the daemon's Unix socket".to_owned(),
        id => printable(id),
    };
    let actions = claims.actions.iter().map(|action| format!("{action:?}").to_lowercase()).collect();
    let begins = if claims.nbf > seconds + CLOCK_SKEW_MS / 1_000 {
        format!("{}, in {}: not yet", rfc3339(claims.nbf), span(claims.nbf - seconds))
    } else {
        rfc3339(claims.nbf)
    };
    let ends = match claims.exp.checked_sub(seconds) {
        Some(left @ 1..) => format!("{}, {} left", rfc3339(claims.exp), span(left)),
        _ => format!("{}, expired {} ago", rfc3339(claims.exp), span(seconds - claims.exp)),
    };
    let signature = match signature {
        None => "not checked: give --keys JWKS".to_owned(),
        Some(Ok(())) => "holds".to_owned(),
        Some(Err(why)) => format!("NOT VALID: {why}"),
    };
    let rows = [
        (
            "header",
            format!("alg {}, typ {}", printable(&header.alg), printable(header.typ.as_deref().unwrap_or("none"))),
        ),
        ("key", printable(header.kid.as_deref().unwrap_or("none: no daemon takes it"))),
        ("signature", signature),
        ("audience", claims.aud.to_string()),
        ("holder", holder),
        ("tenants", list(claims.tenants.iter().map(ToString::to_string).collect())),
        ("topics", list(claims.topics.iter().map(|topic| printable(topic)).collect())),
        ("actions", list(actions)),
        ("valid from", begins),
        ("expires", ends),
    ];
    rows.iter().map(|(name, value)| format!("{name:<11}{value}\n")).collect()
}

/// Seconds since 1970 as RFC 3339, in UTC.
fn rfc3339(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{seconds} s after 1970"))
}

/// A span of time in its two largest units.
fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::authority::{NODE, NOW_MS, TokenRoot, local_claims};

    fn inspected(text: &[u8], keys: Option<&str>) -> (Result<bool, String>, String) {
        let folder = tempfile::tempdir().unwrap();
        let (file, jwks) = (folder.path().join("token"), folder.path().join("keys.json"));
        std::fs::write(&file, text).unwrap();
        keys.into_iter().for_each(|keys| std::fs::write(&jwks, keys).unwrap());
        let args = InspectArgs { file: Some(file), keys: keys.map(|_| jwks) };
        let mut out = Vec::new();
        let done = inspect(&args, NOW_MS, &mut out);
        (done.map_err(|e| e.to_string()), String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_token_is_told_and_never_shown() {
        let (root, other) = (TokenRoot::new(), TokenRoot::new());
        let token = root.mint(&local_claims());
        let jwks = |root: &TokenRoot| serde_json::json!({ "keys": [root.jwk()] }).to_string();
        let mut impostor = other.jwk();
        impostor["kid"] = root.kid.clone().into();
        let impostor = serde_json::json!({ "keys": [impostor] }).to_string();
        for (keys, good, word) in [
            (None, true, "not checked: give --keys"),
            (Some(jwks(&root)), true, "holds"),
            (Some(jwks(&other)), false, "NOT VALID: the token's key is not known"),
            (Some(impostor), false, "NOT VALID: the token's signature does not hold"),
        ] {
            let (done, shown) = inspected(format!("{token}\n").as_bytes(), keys.as_deref());
            assert_eq!(done, Ok(good), "{shown}");
            for part in
                [word, NODE, "publish, subscribe, admin", "local: whoever", "topics     *", "1h0m left", &root.kid]
            {
                assert!(shown.contains(part), "{part}: {shown}");
            }
            assert!(shown.contains("valid from 2026-09-21T"), "{shown}");
            assert!(token.split('.').all(|part| !shown.contains(part)), "{shown}");
        }
        let mut late = local_claims();
        (late["nbf"], late["exp"]) = ((NOW_MS / 1_000 - 200).into(), (NOW_MS / 1_000 - 90).into());
        assert!(inspected(root.mint(&late).as_bytes(), None).1.contains("expired 1m30s ago"));
        (late["nbf"], late["exp"]) = ((NOW_MS / 1_000 + 60).into(), (NOW_MS / 1_000 + 200_000).into());
        let shown = inspected(root.mint(&late).as_bytes(), None).1;
        assert!(shown.contains("in 1m0s: not yet") && shown.contains("2d7h left"), "{shown}");
    }

    #[test]
    fn garbage_is_an_error_that_says_what() {
        let root = TokenRoot::new();
        let mut more = local_claims();
        more["roles"] = 1.into();
        let header = root.header().to_string();
        for (text, part) in [
            ("".to_owned(), "is empty"),
            (" \n".to_owned(), "is empty"),
            ("hello".to_owned(), "three base64url parts"),
            ("\u{0}\u{1}.\u{ff}.x".to_owned(), "header are not base64url"),
            ("e30.e30.e30".to_owned(), "header are not what a daemon takes: missing field `alg`"),
            (root.sign(&header, "[]"), "claims are not what a daemon takes"),
            (root.mint(&more), "unknown field `roles`"),
            (root.sign(r#"{"alg":"EdDSA","crit":["exp"]}"#, "{}"), "unknown field `crit`"),
            ("a".repeat(3_000), "more than the 2048 bytes"),
            ("a".repeat(70_000), "more than the 2048 bytes"),
        ] {
            let (done, shown) = inspected(text.as_bytes(), None);
            let error = done.unwrap_err();
            assert!(error.contains(part) && shown.is_empty(), "{part}: {error}");
        }
        let (done, _) = inspected(root.mint(&local_claims()).as_bytes(), Some("{"));
        assert!(done.unwrap_err().starts_with("--keys: "));
    }
}
