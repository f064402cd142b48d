//! `overlay-operator token create`: a capability token for one OverlayNode, for a run of
//! `overlay-operator local` or in a cluster. Decides what a request may ask for and where the
//! key that signs is; what a token allows is decided by the daemon that it is shown to.
//!
//! The token is the only thing on standard output, and nothing secret is anywhere else.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use overlay_core::frame::MAX_CAP;
use overlay_core::grant::{Action, Claims, LOCAL_HOLDER, MAX_LIST};
use overlay_core::identity::{SpiffeId, TenantId, Topic};

use crate::admit::{self, Admitted};
use crate::api::OverlayNode;
use crate::build::{TOKEN_ROOT_KEY, names};
use crate::local::{self, LocalTokenError};
use crate::trust::{TokenRoot, TrustError, Zeroizing};

/// Bytes of a manifest, as `overlay-operator local` takes it.
const MAX_FILE: u64 = 3 << 20;
/// The longest life of a token: past it, whoever needs it so long can ask again.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Mint capability tokens.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Print a new token on standard output, for one OverlayNode
    #[command(after_long_help = CREATE_HELP)]
    Create(Box<CreateArgs>),
}

const CREATE_HELP: &str = "\
Without --namespace the token is for the run of 'overlay-operator local' on this machine that
has the manifest's OverlayNode; with it, for a cluster: your kubeconfig must allow reading the
Secret overlay-token-root in that namespace. The OverlayNode's namespace is its manifest's,
'default' where that has none: where it is another, mint from the live object, as below.

Whoever holds the token may use it: keep it in a file of mode 0600, or in a Secret.

Examples:
  overlay-operator token create --file mesh.yaml --topics news --actions subscribe --ttl 1h
  overlay-operator token create --file mesh.yaml --topics 'log.*,news' --actions publish \\
      --namespace overlay-system --client collector
  kubectl get overlaynode mesh -n prod -o yaml | overlay-operator token create --file - \\
      --topics news --actions publish --namespace overlay-system --client collector
  overlay-operator token create --file mesh.yaml --topics '*' --actions publish,subscribe |
      overlay-daemon token inspect -

Exit code: 0 minted, 1 not minted, 2 usage.";

/// `overlay-operator token create`.
#[derive(Clone, Debug, clap::Args)]
pub struct CreateArgs {
    /// The manifest of the OverlayNode that the token is for; - for standard input
    #[arg(long, short = 'f', value_name = "MANIFEST")]
    pub file: PathBuf,
    /// Which OverlayNode, where the manifest has several
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Topics: exact, or a prefix followed by *; at most 64
    #[arg(long, required = true, value_delimiter = ',', value_name = "TOPIC,…")]
    pub topics: Vec<String>,
    /// What it allows on them
    #[arg(long, required = true, value_enum, value_delimiter = ',', value_name = "ACTION,…")]
    pub actions: Vec<ActionName>,
    /// For how long it is valid, from now: 30m, 24h
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub ttl: Duration,
    /// The tenants, of those in spec.auth.tenants: 0, a UUID, a ULID or 32 hexadecimal digits
    #[arg(long, value_delimiter = ',', default_value = "0", value_name = "TENANT,…")]
    pub tenant: Vec<TenantId>,
    /// Who may present it: the client of this name in the OverlayNode's namespace [default:
    /// whoever reaches the daemon's Unix socket]
    #[arg(long, value_name = "NAME", conflicts_with = "holder")]
    pub client: Option<String>,
    /// Who may present it: the certificate with this SPIFFE id, or with one below it
    #[arg(long, value_name = "SPIFFE-ID")]
    pub holder: Option<SpiffeId>,
    /// Mint for a cluster: the namespace of its operator, where the token root is
    #[arg(long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// The cluster's trust domain, as the operator was installed with
    #[arg(long, value_name = "DOMAIN", default_value = names::DEFAULT_TRUST_DOMAIN, value_parser = names::trust_domain,
          requires = "namespace")]
    pub trust_domain: String,
}

/// `--actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ActionName {
    /// Put messages on topics
    Publish,
    /// Receive the messages of topics
    Subscribe,
    /// Fetch objects
    Get,
    /// Store objects
    Put,
    /// Read the daemon's state; on its Unix socket only
    Admin,
}

impl From<ActionName> for Action {
    fn from(name: ActionName) -> Self {
        match name {
            ActionName::Publish => Self::Publish,
            ActionName::Subscribe => Self::Subscribe,
            ActionName::Get => Self::Get,
            ActionName::Put => Self::Put,
            ActionName::Admin => Self::Admin,
        }
    }
}

/// Why there is no token. Names the option and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The manifest cannot be used.
    #[error("--file: {0}")]
    File(String),
    /// An option asks for what cannot be.
    #[error("{option}: {message}")]
    Option {
        /// Which.
        option: &'static str,
        /// Why, and what would be right.
        message: String,
    },
    /// No run on this machine.
    #[error(transparent)]
    Local(#[from] LocalTokenError),
    /// The cluster's token root cannot be had.
    #[error("--namespace {namespace}: Secret {}: {message}", names::TOKEN_ROOT_SECRET)]
    Cluster {
        /// Where it was looked for.
        namespace: String,
        /// Why.
        message: String,
    },
    /// It was not signed.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Nobody took it.
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
}

fn option(option: &'static str, message: impl fmt::Display) -> TokenError {
    TokenError::Option { option, message: message.to_string() }
}

/// Runs to the end. Everything that is wrong was told on standard error.
pub async fn run(args: Args) -> ExitCode {
    let Command::Create(args) = args.command;
    match create(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("error: {line}");
            }
            ExitCode::FAILURE
        }
    }
}

async fn create(args: &CreateArgs) -> Result<(), TokenError> {
    let node = manifest(args)?;
    // All that can be wrong with the request is said before a key is read.
    let holder = holder(args, &node)?;
    check(args, &node, &holder)?;
    let (root, audience) = match &args.namespace {
        None => local::token_root(&node)?,
        Some(namespace) => {
            let audience = names::identity(&node, &args.trust_domain)
                .map_err(|error| option("--trust-domain", format!("{}: {error}", args.trust_domain)))?;
            (cluster_root(namespace).await?, audience)
        }
    };
    let token = mint(args, &root, audience, holder, SystemTime::now())?;
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", *token).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(TokenError::Output(error)),
        _ => Ok(()),
    }
}

fn manifest(args: &CreateArgs) -> Result<OverlayNode, TokenError> {
    let shown =
        if args.file.as_os_str() == "-" { "standard input".to_owned() } else { args.file.display().to_string() };
    let text = read(&args.file).map_err(|error| TokenError::File(format!("{shown}: {error}")))?;
    let admitted = admit::documents(&text, &shown)
        .map_err(|errors| TokenError::File(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
    choose(admitted, args.name.as_deref()).map_err(|message| match args.name {
        None => TokenError::File(format!("{shown}: {message}")),
        Some(_) => option("--name", message),
    })
}

fn read(path: &PathBuf) -> io::Result<String> {
    let mut text = String::new();
    let mut file: Box<dyn io::Read> =
        if path.as_os_str() == "-" { Box::new(io::stdin().lock()) } else { Box::new(std::fs::File::open(path)?) };
    io::Read::read_to_string(&mut io::Read::take(&mut file, MAX_FILE + 1), &mut text)?;
    if text.len() as u64 > MAX_FILE { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
}

fn choose(admitted: Vec<Admitted>, name: Option<&str>) -> Result<OverlayNode, String> {
    let there: Vec<String> = admitted.iter().map(|a| names::name(&a.node).to_owned()).collect();
    let mut nodes = admitted.into_iter().map(|a| a.node).filter(|node| name.is_none_or(|n| n == names::name(node)));
    match (nodes.next(), nodes.next(), name) {
        (Some(node), None, _) => Ok(node),
        (None, _, Some(name)) => Err(format!("no OverlayNode {name} in the manifest, it has {}", there.join(", "))),
        (None, _, None) => Err("holds no OverlayNode".to_owned()),
        (Some(_), Some(_), _) => {
            Err(format!("holds several OverlayNodes ({}): choose one with --name", there.join(", ")))
        }
    }
}

/// The claim `sub`. A client's id has the trust domain that the audience turns out to have.
enum Holder {
    Fixed(String),
    Client { namespace: String, name: String },
}

fn holder(args: &CreateArgs, node: &OverlayNode) -> Result<Holder, TokenError> {
    match (&args.client, &args.holder) {
        (None, None) => Ok(Holder::Fixed(LOCAL_HOLDER.to_owned())),
        (None, Some(id)) => Ok(Holder::Fixed(id.to_string())),
        (Some(name), _) => {
            let namespace = names::namespace(node).to_owned();
            client_id("td", &namespace, name)
                .map_err(|_| option("--client", format!("{name}: must be letters, digits, '-', '_' and '.'")))?;
            Ok(Holder::Client { namespace, name: name.clone() })
        }
    }
}

fn client_id(trust_domain: &str, namespace: &str, name: &str) -> Result<SpiffeId, overlay_core::identity::NameError> {
    format!("spiffe://{trust_domain}/ns/{namespace}/client/{name}").parse()
}

/// What can be said of a request without a key.
fn check(args: &CreateArgs, node: &OverlayNode, holder: &Holder) -> Result<(), TokenError> {
    for topic in &args.topics {
        let name = topic.strip_suffix('*').unwrap_or(topic);
        let is_pattern = topic.ends_with('*') && (name.is_empty() || name.parse::<Topic>().is_ok());
        if !is_pattern && topic.parse::<Topic>().is_err() {
            let message =
                "must be a topic of 1 to 255 bytes without control characters, or a prefix of one followed by *";
            return Err(option("--topics", format!("{topic:?}: {message}")));
        }
    }
    for (option_name, count) in [("--topics", args.topics.len()), ("--tenant", args.tenant.len())] {
        if count > MAX_LIST {
            return Err(option(option_name, format!("{count} of them; a token lists at most {MAX_LIST}")));
        }
    }
    let carried = &node.spec.auth.tenants;
    if let Some(foreign) = args.tenant.iter().find(|tenant| !carried.contains(tenant)) {
        let carried: Vec<String> = carried.iter().map(ToString::to_string).collect();
        let node = format!("{}/{}", names::namespace(node), names::name(node));
        let message = format!("{foreign}: is not in spec.auth.tenants of OverlayNode {node}: {}", carried.join(", "));
        return Err(option("--tenant", message));
    }
    let is_local = matches!(holder, Holder::Fixed(id) if id == LOCAL_HOLDER);
    if args.actions.contains(&ActionName::Admin) && !is_local {
        return Err(option("--actions", "admin is allowed on the Unix socket only: leave out --client and --holder"));
    }
    Ok(())
}

fn mint(
    args: &CreateArgs,
    root: &TokenRoot,
    audience: SpiffeId,
    holder: Holder,
    now: SystemTime,
) -> Result<Zeroizing<String>, TokenError> {
    let sub = match holder {
        Holder::Fixed(sub) => sub,
        Holder::Client { namespace, name } => {
            let domain = audience.as_str().trim_start_matches("spiffe://").split('/').next().unwrap_or_default();
            client_id(domain, &namespace, &name).map_err(|error| option("--client", format!("{name}: {error}")))?.into()
        }
    };
    let mut actions: Vec<Action> = args.actions.iter().copied().map(Action::from).collect();
    actions.sort_unstable();
    actions.dedup();
    let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = Claims {
        aud: audience,
        sub,
        tenants: args.tenant.clone(),
        topics: args.topics.clone(),
        actions,
        nbf: seconds(now),
        exp: seconds(now + args.ttl),
    };
    let token = root.mint(&claims)?;
    if token.len() > MAX_CAP {
        let message = format!("the token would have {} bytes, at most {MAX_CAP}: name fewer, or a prefix", token.len());
        return Err(option("--topics", message));
    }
    Ok(token)
}

async fn cluster_root(namespace: &str) -> Result<TokenRoot, TokenError> {
    let wrong = |message: String| TokenError::Cluster { namespace: namespace.to_owned(), message };
    let client = Client::try_default().await.map_err(|error| wrong(format!("no cluster to ask: {error}")))?;
    let secret = Api::<Secret>::namespaced(client, namespace).get_opt(names::TOKEN_ROOT_SECRET).await;
    let secret = secret.map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let secret =
        secret.ok_or_else(|| wrong("there is none: is the operator installed in this namespace?".to_owned()))?;
    let key = secret.data.as_ref().and_then(|data| data.get(TOKEN_ROOT_KEY));
    let key = key.and_then(|key| String::from_utf8(key.0.clone()).ok()).map(Zeroizing::new);
    let key = key.ok_or_else(|| wrong(format!("has no key {TOKEN_ROOT_KEY}")))?;
    TokenRoot::from_pem(&key).map_err(|error| wrong(error.to_string()))
}

/// A lifetime of whole seconds, a year at the most.
fn lifetime(text: &str) -> Result<Duration, String> {
    let duration: crate::api::Duration = text.parse().map_err(|error: crate::api::DurationError| error.to_string())?;
    match duration.get() {
        ttl if (Duration::from_secs(1)..=LONGEST).contains(&ttl) => Ok(ttl),
        _ => Err("must be 1s to 8760h".to_owned()),
    }
}

#[cfg(test)]
mod tests;
