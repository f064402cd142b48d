//! Where a publisher's messages come from: an argument, a file, standard input; whole or by
//! the line. Keeps no more of a message than the daemon could accept: of a larger one, its
//! size and hash, with which the daemon can be asked all the same.

use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use overlay_core::frame::{CHUNK, MAX_BODY};
use overlay_core::record::{Digest, Publish, pieces};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};

use super::ClientError;

/// A message to publish. Cloning shares its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// One that the daemon may accept.
    Whole(Bytes),
    /// One that is larger than any daemon accepts: the daemon says so, by its size.
    Oversize { size: u32, hash: Digest },
}

impl Body {
    /// The payloads of the frames that publish it. They share its memory where it is large.
    pub(super) fn payloads(&self) -> Vec<Bytes> {
        match self {
            Self::Oversize { size, hash } => vec![Publish::Begin { size: *size, hash: *hash }.encode()],
            Self::Whole(bytes) if bytes.len() <= CHUNK => vec![Publish::Message(bytes.clone()).encode()],
            Self::Whole(bytes) => {
                let hash = blake3::hash(bytes).into();
                let begin = Publish::Begin { size: u32::try_from(bytes.len()).unwrap_or(u32::MAX), hash };
                let chunks = pieces(bytes, hash).map(|piece| Publish::Piece(piece).encode());
                std::iter::once(begin.encode()).chain(chunks).collect()
            }
        }
    }
}

/// A message under construction, fed in parts.
#[derive(Default)]
struct Gathering {
    kept: BytesMut,
    /// Once it is too large: what was read of it so far.
    dropped: Option<(u64, Box<blake3::Hasher>)>,
}

impl Gathering {
    fn add(&mut self, part: &[u8]) -> io::Result<()> {
        if self.dropped.is_none() && self.kept.len() + part.len() > MAX_BODY {
            let mut hasher = Box::new(blake3::Hasher::new());
            hasher.update(&self.kept);
            self.dropped = Some((self.kept.len() as u64, hasher));
            self.kept = BytesMut::new();
        }
        match &mut self.dropped {
            None => self.kept.extend_from_slice(part),
            Some((size, hasher)) => {
                hasher.update(part);
                *size += part.len() as u64;
                if *size > u64::from(u32::MAX) {
                    return Err(io::Error::new(io::ErrorKind::FileTooLarge, "over 4 GiB; a message has at most 1 MiB"));
                }
            }
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.dropped.is_none()
    }

    fn take(&mut self) -> Body {
        let Self { kept, dropped } = std::mem::take(self);
        match dropped {
            None => Body::Whole(kept.freeze()),
            Some((size, hasher)) => {
                Body::Oversize { size: u32::try_from(size).unwrap_or(u32::MAX), hash: hasher.finalize().into() }
            }
        }
    }
}

/// How a source is cut into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// All of it is one.
    Whole,
    /// Each line is one, without its newline.
    Lines,
}

/// A source of messages.
pub(super) struct Input {
    name: String,
    reader: Option<Box<dyn AsyncBufRead + Unpin>>,
    cut: Cut,
    gathering: Gathering,
    taken: u64,
}

impl Input {
    /// The text of an argument.
    pub(super) fn argument(text: String) -> Self {
        Self::of("the argument".into(), io::Cursor::new(text.into_bytes()), Cut::Whole)
    }

    /// Standard input.
    pub(super) fn stdin(cut: Cut) -> Self {
        Self::of("standard input".into(), BufReader::new(tokio::io::stdin()), cut)
    }

    /// A file.
    pub(super) async fn file(path: &Path, cut: Cut) -> Result<Self, ClientError> {
        let name = path.display().to_string();
        match tokio::fs::File::open(path).await {
            Ok(file) => Ok(Self::of(name, BufReader::with_capacity(CHUNK, file), cut)),
            Err(source) => Err(ClientError::Input { name, source }),
        }
    }

    fn of(name: String, reader: impl AsyncBufRead + Unpin + 'static, cut: Cut) -> Self {
        Self { name, reader: Some(Box::new(reader)), cut, gathering: Gathering::default(), taken: 0 }
    }

    /// The next message with what to call it; nothing at the end. Cancelled, it loses nothing.
    pub(super) async fn next(&mut self) -> Result<Option<(String, Body)>, ClientError> {
        self.read().await.map_err(|source| ClientError::Input { name: self.name.clone(), source })
    }

    async fn read(&mut self) -> io::Result<Option<(String, Body)>> {
        while let Some(reader) = &mut self.reader {
            let part = reader.fill_buf().await?;
            if part.is_empty() {
                self.reader = None;
                // An empty input is an empty message; no text after the last newline is none.
                let last = self.cut == Cut::Whole || !self.gathering.is_empty();
                return Ok(last.then(|| self.finish()));
            }
            let newline = if self.cut == Cut::Lines { part.iter().position(|byte| *byte == b'\n') } else { None };
            self.gathering.add(&part[..newline.unwrap_or(part.len())])?;
            let read = newline.map_or(part.len(), |at| at + 1);
            reader.consume(read);
            if newline.is_some() {
                return Ok(Some(self.finish()));
            }
        }
        Ok(None)
    }

    fn finish(&mut self) -> (String, Body) {
        self.taken += 1;
        let name = match self.cut {
            Cut::Whole => "the message".to_owned(),
            Cut::Lines => format!("line {}", self.taken),
        };
        (name, self.gathering.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(text: &'static [u8], cut: Cut, buffer: usize) -> Vec<Body> {
        let mut input = Input::of("test".into(), BufReader::with_capacity(buffer, text), cut);
        let mut found = Vec::new();
        while let Some((_, body)) = input.next().await.unwrap() {
            found.push(body);
        }
        found
    }

    /// However reads happen to cut the input.
    #[tokio::test]
    async fn inputs_become_messages() {
        for (text, cut, want) in [
            (&b""[..], Cut::Whole, vec![""]),
            (b"", Cut::Lines, vec![]),
            (b"a\nb\n", Cut::Whole, vec!["a\nb\n"]),
            (b"a\nb\n", Cut::Lines, vec!["a", "b"]),
            (b"a\n\nb", Cut::Lines, vec!["a", "", "b"]),
            (b"a\r\n", Cut::Lines, vec!["a\r"]),
        ] {
            for buffer in [1, 2, 64] {
                let want: Vec<Body> =
                    want.iter().map(|text| Body::Whole(Bytes::from_static(text.as_bytes()))).collect();
                assert_eq!(all(text, cut, buffer).await, want, "{text:?} {cut:?} by {buffer}");
            }
        }
    }

    /// I-9: past 1 MiB nothing is kept; the size and hash are those of the whole.
    #[tokio::test]
    async fn what_is_too_large_keeps_its_size_and_hash() {
        let text: &'static [u8] = vec![7; MAX_BODY + 1].leak();
        assert!(
            matches!(&all(&text[1..], Cut::Whole, CHUNK).await[..], [Body::Whole(bytes)] if bytes.len() == MAX_BODY)
        );
        let want = Body::Oversize { size: 1_048_577, hash: blake3::hash(text).into() };
        assert_eq!(all(text, Cut::Whole, CHUNK).await, std::slice::from_ref(&want));
        assert_eq!(want.payloads().len(), 1, "Begin alone");
    }

    #[test]
    fn a_message_is_framed_by_its_size() {
        let kinds = |size| Body::Whole(Bytes::from(vec![1; size])).payloads().iter().map(|p| p[0]).collect::<Vec<_>>();
        assert_eq!(kinds(0), [0]);
        assert_eq!(kinds(CHUNK), [0]);
        assert_eq!(kinds(CHUNK + 1), [1, 2, 2]);
        assert_eq!(kinds(MAX_BODY).len(), 17);
    }
}
