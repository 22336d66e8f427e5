//! Hostile sizes: what is read and segmented is bounded by the size of the input.

use std::time::Duration;

use cpu_time::ThreadTime;

use xtoken::segment::Scores;
use xtoken::{Error, Token, Tokenizer};

/// Far above what linear work takes, and far below what quadratic work takes.
const SOON: Duration = Duration::from_secs(20);

fn soon<T>(work: impl FnOnce() -> T) -> T {
    // Of this thread alone: a busy machine changes nothing.
    let start = ThreadTime::now();
    let answer = work();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    answer
}

fn is_refused(tokenizer: xtoken::Result<Tokenizer>) -> bool {
    match tokenizer {
        Err(Error::Format { reason, .. }) => reason.contains("outnumber"),
        _ => false,
    }
}

#[test]
fn holes_are_bounded_in_total_and_not_one_by_one() {
    // Each gap alone is one that a file may have.
    let ids = (0..2_000u32).map(|at| at * 100_000);
    let vocab: Vec<String> = ids.clone().map(|id| format!("\"t{id}\": {id}")).collect();
    let json = format!(
        r#"{{"decoder": {{"type": "ByteLevel"}}, "model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#,
        vocab.join(",")
    );
    assert!(json.len() < 100_000);
    assert!(soon(|| is_refused(Tokenizer::from_json(
        json.as_bytes(),
        Scores::FromFile
    ))));
    let lines: Vec<String> = ids.map(|id| format!("{:08} {id}", id / 100_000)).collect();
    let file = lines.join("\n");
    assert!(soon(|| is_refused(Tokenizer::from_tiktoken(
        file.as_bytes(),
        &[]
    ))));
    let far = [("<|end|>".to_owned(), 4_000_000)];
    assert!(is_refused(Tokenizer::from_tiktoken(b"YQ== 0", &far)));
    let near = [("<|end|>".to_owned(), 100_000)];
    let tokenizer = Tokenizer::from_tiktoken(b"YQ== 0", &near).unwrap();
    assert_eq!(tokenizer.vocab.len(), 100_001);
}

#[test]
fn one_huge_ranked_token_is_linear_to_read_and_to_segment() {
    let size = 400_000;
    let mut tokens = vec![Token::Text(b"a".to_vec()), Token::Text(b"b".to_vec())];
    tokens.extend((1..12).map(|power| Token::Text(vec![b'a'; 1 << power])));
    tokens.push(Token::Text(vec![b'a'; size]));
    let tokenizer = soon(|| Tokenizer::from_tokens(tokens, true).unwrap());
    let word = vec![b'a'; size - 1];
    let pieces = soon(|| tokenizer.segment(&word).unwrap().unwrap());
    assert!(pieces.len() < 1_000);
    assert_eq!(tokenizer.segment(&vec![b'a'; size]).unwrap().unwrap(), [13]);
}

#[test]
fn one_huge_unigram_token_is_linear_to_segment() {
    let size = 100_000;
    let long = "a".repeat(size);
    let json = format!(
        r#"{{"decoder": {{"type": "Metaspace"}}, "model": {{"type": "Unigram", "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["a", -2.0], ["aa", -3.0], ["{long}", -4.0]]}}}}"#
    );
    let tokenizer = soon(|| Tokenizer::from_json(json.as_bytes(), Scores::FromFile).unwrap());
    let segment = |count: usize| {
        soon(|| {
            tokenizer
                .segment("a".repeat(count).as_bytes())
                .unwrap()
                .unwrap()
        })
    };
    assert_eq!(segment(size), [3]);
    // Of two equal scores the longest last token wins.
    assert_eq!(segment(size + 1), [1, 3]);
    assert_eq!(segment(size - 2), vec![2; size / 2 - 1]);
    assert_eq!(segment(3 * size), [3, 3, 3]);
}

#[test]
fn one_huge_wordpiece_word_is_linear_to_segment() {
    let size = 100_000;
    let long = "a".repeat(size);
    let json = format!(
        r###"{{"decoder": {{"type": "WordPiece", "prefix": "##"}},
            "model": {{"type": "WordPiece", "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 9000000000,
            "vocab": {{"[UNK]": 0, "##a": 1, "##aaa": 2, "{long}": 3, "##{long}": 4}}}}}}"###
    );
    let tokenizer = soon(|| Tokenizer::from_json(json.as_bytes(), Scores::FromFile).unwrap());
    let segment = |text: &str| soon(|| tokenizer.segment(text.as_bytes()).unwrap());
    assert_eq!(segment(&format!(" {long}aaaa")).unwrap(), [3, 2, 1]);
    assert_eq!(segment(&long).unwrap(), [4]);
    let pieces = segment(&"a".repeat(size - 1)).unwrap();
    assert_eq!(pieces, vec![2; size / 3]);
    assert_eq!(segment(&format!(" {}", "a".repeat(size - 1))), None);
}

#[test]
fn many_nested_ranked_tokens_make_the_merges_that_plain_search_finds() {
    // Every token of up to 40 letters a and b that a plain list of prefixes holds.
    let text = b"abaababaabaababaababaabaababaabaababaaba";
    let mut tokens: Vec<Vec<u8>> = vec![b"a".to_vec(), b"b".to_vec()];
    for end in 2..text.len() {
        tokens.push(text[..end].to_vec());
        tokens.push(text[end - 2..end + 1].to_vec());
    }
    let tokenizer = Tokenizer::from_tokens(tokens.iter().cloned().map(Token::Text), true).unwrap();
    for start in 0..text.len() {
        let word = &text[start..];
        let pieces = tokenizer.segment(word).unwrap().unwrap();
        assert_eq!(pieces, plain(&tokenizer, word));
    }
}

/// Merges two neighbours whose bytes are a token, the lowest id first, of equal ones the leftmost.
fn plain(tokenizer: &Tokenizer, word: &[u8]) -> Vec<u32> {
    if let Some(id) = tokenizer.vocab.id_of(word) {
        return vec![id];
    }
    let mut parts: Vec<Vec<u8>> = word.iter().map(|&byte| vec![byte]).collect();
    loop {
        let merged = |at: usize| tokenizer.vocab.id_of(&parts[at..at + 2].concat());
        let best = (0..parts.len() - 1)
            .filter_map(|at| Some((merged(at)?, at)))
            .min();
        let Some((_, at)) = best else { break };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
    parts
        .iter()
        .filter_map(|part| tokenizer.vocab.id_of(part))
        .collect()
}
