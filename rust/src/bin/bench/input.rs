//! Tokenizers, text and ids from files.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xtoken::segment::Scores;
use xtoken::{DummyPrefix, Tokenizer, Vocab};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A pair of tokenizers and the text that both spell.
#[derive(clap::Args)]
pub struct Arguments {
    /// The student's tokenizer.json, or its directory.
    #[arg(long)]
    pub student: PathBuf,
    /// The teacher's tokenizer.json, or its directory.
    #[arg(long)]
    pub teacher: PathBuf,
    /// A file of text in UTF-8.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Bytes of text in each sequence, about.
    #[arg(long, default_value_t = 8192)]
    pub sequence_bytes: usize,
    /// Measurements of each candidate.
    #[arg(long, default_value_t = 15)]
    pub rounds: usize,
}

impl Arguments {
    /// The file of text.
    pub fn text(&self) -> Result<&Path> {
        self.text
            .as_deref()
            .ok_or_else(|| "pass --text, a file in UTF-8".into())
    }
}

/// One side, ready to tokenize.
pub struct Side {
    pub name: String,
    pub vocab: Arc<Vocab>,
    encoder: Encoder,
}

impl Side {
    pub fn read(path: &Path) -> Result<Self> {
        let file = path.join("tokenizer.json");
        let path = if path.is_dir() { &file } else { path };
        let json = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let tokenizer = Tokenizer::from_json(&json, Scores::FromFile)?;
        let folder = path.parent().and_then(Path::file_name);
        let vocab = Arc::new(tokenizer.vocab.clone());
        Ok(Self {
            name: folder
                .unwrap_or(path.as_os_str())
                .to_string_lossy()
                .into_owned(),
            vocab,
            encoder: Encoder::new(tokenizer, &json)?,
        })
    }

    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        self.encoder.encode(text)
    }

    /// The bytes of each token, without the dummy prefix.
    pub fn text(&self, ids: &[i64]) -> Vec<&[u8]> {
        let mut tokens: Vec<&[u8]> = ids
            .iter()
            .map(|&id| self.vocab.token_bytes(id as u32))
            .collect();
        if self.vocab.dummy_prefix() != DummyPrefix::Never
            && let Some(first) = tokens.first_mut()
        {
            *first = first.strip_prefix(b" ").unwrap_or(first);
        }
        tokens
    }
}

pub fn read_text(path: &Path) -> Result<String> {
    Ok(std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Sequences of ids, one per line.
pub fn read_ids(path: &Path) -> Result<Vec<Vec<i64>>> {
    let parse = |id: &str| {
        id.parse()
            .map_err(|error| format!("{}: {id}: {error}", path.display()))
    };
    let line_ids = |line: &str| line.split_whitespace().map(parse).collect();
    Ok(read_text(path)?
        .lines()
        .map(line_ids)
        .collect::<std::result::Result<_, String>>()?)
}

/// Cuts a text at line ends into pieces of about `bytes`.
pub fn pieces(text: &str, bytes: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices('\n') {
        if at + 1 - start >= bytes {
            pieces.push(&text[start..=at]);
            start = at + 1;
        }
    }
    if start < text.len() {
        pieces.push(&text[start..]);
    }
    pieces
}

#[cfg(feature = "tokenizers")]
struct Encoder(tokenizers::Tokenizer);

#[cfg(feature = "tokenizers")]
impl Encoder {
    fn new(_: Tokenizer, json: &[u8]) -> Result<Self> {
        Ok(Self(
            tokenizers::Tokenizer::from_bytes(json).map_err(|error| error.to_string())?,
        ))
    }

    fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self
            .0
            .encode_fast(text, false)
            .map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }
}

/// Without the `tokenizers` feature: the tokenizer's own model on words that are cut before a space
/// that no space precedes, after each digit's run and at line ends. Close to what it would make of
/// the text, and the same bytes, a dummy prefix among them.
#[cfg(not(feature = "tokenizers"))]
struct Encoder(Tokenizer);

#[cfg(not(feature = "tokenizers"))]
impl Encoder {
    fn new(tokenizer: Tokenizer, _: &[u8]) -> Result<Self> {
        Ok(Self(tokenizer))
    }

    fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let mut ids = Vec::new();
        let prefixed;
        let text = match self.0.vocab.dummy_prefix() {
            DummyPrefix::Never => text,
            DummyPrefix::First | DummyPrefix::Every => {
                prefixed = format!(" {text}");
                &prefixed
            }
        };
        for word in words(text) {
            let pieces = self.0.segment(word.as_bytes())?;
            let pieces = pieces.ok_or_else(|| format!("the vocabulary cannot spell {word:?}"))?;
            ids.extend(pieces.into_iter().map(i64::from));
        }
        Ok(ids)
    }
}

#[cfg(not(feature = "tokenizers"))]
fn words(text: &str) -> impl Iterator<Item = &str> {
    let class = |c: char| match c {
        ' ' => 0,
        c if c.is_whitespace() => 1,
        c if c.is_ascii_digit() => 2,
        c if c.is_alphabetic() => 3,
        _ => 4,
    };
    let mut cuts = vec![0];
    let mut before = None;
    for (at, c) in text.char_indices() {
        let now = class(c);
        if before.is_some_and(|before| now != before && before != 0) {
            cuts.push(at);
        }
        before = Some(now);
    }
    cuts.push(text.len());
    (1..cuts.len())
        .map(move |at| &text[cuts[at - 1]..cuts[at]])
        .filter(|word| !word.is_empty())
}
