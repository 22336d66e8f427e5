//! Reads rank files: tiktoken's lines of `base64 rank`, and Mistral's tekken JSON.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::holes::Holes;
use super::{DummyPrefix, Spelling, Vocab, VocabBuilder};
use crate::error::{Error, Result};

const TIKTOKEN_REMEDY: &str = "pass a file of lines 'base64-of-the-token rank'";
const TEKKEN_REMEDY: &str = "pass a tekken.json as Mistral publishes it";

/// A tiktoken rank file with the special tokens that its tokenizer adds; ranks are ids.
///
/// # Errors
/// [`Error::Format`] for a line that is no pair of base64 and rank, or an id that is taken twice.
pub fn from_tiktoken(file: &[u8], specials: &[(String, u32)]) -> Result<Vocab> {
    let malformed = |line: usize, reason: &str| Error::Format {
        what: "tiktoken rank file",
        reason: format!("line {line}: {reason}"),
        remedy: TIKTOKEN_REMEDY,
    };
    let mut tokens: Vec<(u32, RankFileToken)> = Vec::new();
    for (at, line) in file.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let mut fields = line.split(|&byte| byte == b' ');
        let (Some(token), Some(rank), None) = (fields.next(), fields.next(), fields.next()) else {
            return Err(malformed(at + 1, "it does not hold two fields"));
        };
        let bytes = BASE64_STANDARD
            .decode(token)
            .map_err(|error| malformed(at + 1, &format!("bad base64: {error}")))?;
        let id = str::from_utf8(rank)
            .ok()
            .and_then(|rank| rank.parse().ok())
            .ok_or_else(|| malformed(at + 1, "the rank is not a number in 0..2^32"))?;
        tokens.push((id, RankFileToken::Text(bytes)));
    }
    if tokens.is_empty() {
        return Err(malformed(1, "the file holds no token"));
    }
    tokens.extend(
        specials
            .iter()
            .map(|(text, id)| (*id, RankFileToken::Special(text.clone()))),
    );
    assemble(tokens, "tiktoken rank file", TIKTOKEN_REMEDY)
}

#[derive(Deserialize)]
struct Tekken {
    config: TekkenConfig,
    vocab: Vec<TekkenToken>,
    #[serde(default)]
    special_tokens: Option<Vec<TekkenSpecial>>,
}

#[derive(Deserialize)]
struct TekkenConfig {
    #[serde(default)]
    pattern: Option<String>,
    default_vocab_size: usize,
    default_num_special_tokens: u32,
}

#[derive(Deserialize)]
struct TekkenToken {
    rank: u32,
    token_bytes: String,
}

#[derive(Deserialize)]
struct TekkenSpecial {
    rank: u32,
    token_str: String,
}

/// Special tokens of the files that do not list them (the first tekken release).
const TEKKEN_SPECIALS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// A `tekken.json`, and the regular expression that cuts its text: specials take the first ids, then the ranks that the default size keeps.
///
/// # Errors
/// [`Error::Format`] where it is not JSON of that shape.
pub fn from_tekken(file: &[u8]) -> Result<(Vocab, Option<String>)> {
    let format = |reason: String| Error::Format {
        what: "tekken.json",
        reason,
        remedy: TEKKEN_REMEDY,
    };
    let tekken: Tekken = serde_json::from_slice(file).map_err(|error| format(error.to_string()))?;
    let specials = tekken.config.default_num_special_tokens;
    if specials as usize > tekken.config.default_vocab_size || specials > 1 << 20 {
        return Err(format(format!(
            "{specials} special tokens in a vocabulary of {}",
            tekken.config.default_vocab_size
        )));
    }
    let mut names: Vec<String> = (0..specials).map(|id| format!("<SPECIAL_{id}>")).collect();
    let listed = tekken.special_tokens.unwrap_or_else(|| {
        let known = TEKKEN_SPECIALS.iter().zip(0..);
        known
            .map(|(&text, rank)| TekkenSpecial {
                rank,
                token_str: text.to_owned(),
            })
            .collect()
    });
    for special in listed {
        if let Some(name) = names.get_mut(special.rank as usize) {
            *name = special.token_str;
        }
    }
    let mut tokens: Vec<(u32, RankFileToken)> = (0..)
        .zip(names.into_iter().map(RankFileToken::Special))
        .collect();
    let kept = tekken.config.default_vocab_size - specials as usize;
    for token in tekken.vocab {
        if token.rank as usize >= kept {
            continue;
        }
        let bytes = BASE64_STANDARD
            .decode(&token.token_bytes)
            .map_err(|error| {
                format(format!("token of rank {}: bad base64: {error}", token.rank))
            })?;
        tokens.push((specials + token.rank, RankFileToken::Text(bytes)));
    }
    let vocab = assemble(tokens, "tekken.json", TEKKEN_REMEDY)?;
    Ok((vocab, tekken.config.pattern))
}

enum RankFileToken {
    Text(Vec<u8>),
    Special(String),
}

fn assemble(
    mut tokens: Vec<(u32, RankFileToken)>,
    what: &'static str,
    remedy: &'static str,
) -> Result<Vocab> {
    tokens.sort_by_key(|(id, _)| *id);
    let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
    let mut holes = Holes::among(tokens.len());
    for (id, token) in tokens {
        if (id as usize) < builder.len() {
            let reason = format!("id {id} follows id {}", builder.len() as i64 - 1);
            return Err(Error::Format {
                what,
                reason,
                remedy,
            });
        }
        holes.fill(&mut builder, id, what, remedy)?;
        match token {
            RankFileToken::Text(bytes) => builder.push_text(&bytes)?,
            RankFileToken::Special(text) => builder.push_special(&text)?,
        };
    }
    Ok(builder.build())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::TokenKind;

    #[test]
    fn tiktoken_ranks_are_ids_and_specials_fill_their_own() {
        let specials = [("<|endoftext|>".to_owned(), 4)];
        let vocab = from_tiktoken(b"YQ== 0\n4p8= 1\nIHRoZQ== 2\n", &specials).unwrap();
        assert_eq!(vocab.token_bytes(1), [0xE2, 0x9F]);
        assert_eq!(vocab.token_bytes(2), b" the");
        assert_eq!(vocab.kind(3), TokenKind::Unused);
        assert_eq!(vocab.special_text(4), Some("<|endoftext|>"));
    }

    #[test]
    fn a_damaged_rank_file_names_its_line() {
        for (file, expected) in [
            ("YQ== 0\n???? 1", "line 2: bad base64"),
            ("YQ==", "line 1: it does not hold two fields"),
            ("YQ== -1", "line 1: the rank is not a number"),
            ("", "holds no token"),
            ("YQ== 0\nYg== 0", "id 0 follows id 0"),
            ("YQ== 4000000000", "id 4000000000 follows"),
        ] {
            let error = from_tiktoken(file.as_bytes(), &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn tekken_puts_specials_first_and_drops_ranks_past_its_size() {
        let json = br#"{"config": {"default_vocab_size": 5, "default_num_special_tokens": 3},
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}, {"rank": 1, "token_bytes": "Yg=="},
                      {"rank": 2, "token_bytes": "Yw=="}],
            "special_tokens": [{"rank": 1, "token_str": "<s>"}]}"#;
        let (vocab, pattern) = from_tekken(json).unwrap();
        assert_eq!(pattern, None);
        assert_eq!(vocab.len(), 5);
        assert_eq!(vocab.token_bytes(3), b"a");
        assert_eq!(vocab.special_text(1), Some("<s>"));
        assert_eq!(vocab.special_text(2), Some("<SPECIAL_2>"));
        assert!(from_tekken(b"{}").is_err());
    }
}
