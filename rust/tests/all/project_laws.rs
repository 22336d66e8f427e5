//! Segmentation against the plain algorithm, laws of W, and input that must never panic.

use proptest::prelude::*;
use xtoken::projection::{Canonical, Options, Reverse, Rule, build};
use xtoken::segment::{Model, Scores};
use xtoken::{Error, Threads, Token, Tokenizer};

use crate::common::draws;

/// All single bytes of a small alphabet, then these tokens in order of rank.
fn ranked(tokens: &[Vec<u8>]) -> Tokenizer {
    let mut all: Vec<Vec<u8>> = (b'a'..=b'd').map(|byte| vec![byte]).collect();
    for token in tokens {
        if !all.contains(token) {
            all.push(token.clone());
        }
    }
    Tokenizer::from_tokens(all.into_iter().map(Token::Text), true).unwrap()
}

/// Byte pair encoding as its definition reads: the pair of lowest rank, the leftmost of them.
fn plain_bpe(tokenizer: &Tokenizer, word: &[u8]) -> Vec<u32> {
    if let Some(id) = tokenizer.vocab.id_of(word) {
        return vec![id];
    }
    let mut parts: Vec<Vec<u8>> = word.iter().map(|&byte| vec![byte]).collect();
    loop {
        let best = (1..parts.len())
            .filter_map(|at| Some((tokenizer.vocab.id_of(&parts[at - 1..=at].concat())?, at)))
            .min();
        let Some((_, at)) = best else { break };
        let right = parts.remove(at);
        parts[at - 1].extend(right);
    }
    parts
        .iter()
        .map(|part| tokenizer.vocab.id_of(part).unwrap())
        .collect()
}

fn token() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(b'a'..=b'd', 2..6)
}

fn tokens() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(token(), 0..30)
}

proptest! {
    #![proptest_config(draws(200))]

    #[test]
    fn short_and_long_words_merge_as_the_definition_reads(
        tokens in tokens(),
        word in prop::collection::vec(b'a'..=b'd', 1..120),
    ) {
        let tokenizer = ranked(&tokens);
        prop_assert_eq!(tokenizer.segment(&word).unwrap().unwrap(), plain_bpe(&tokenizer, &word));
    }

    #[test]
    fn a_row_sums_to_one_or_is_empty_and_falls_in_weight(
        student in tokens(),
        teacher in tokens(),
        decay in 0.0..=1.0f64,
        top_k in 1..5usize,
        max_pieces in 1..5usize,
        reverse in prop::sample::select(vec![Reverse::Off, Reverse::Unmatched, Reverse::All]),
    ) {
        let (student, teacher) = (ranked(&student), ranked(&teacher));
        let options = Options { decay, top_k, max_pieces, reverse, ..Options::default() };
        let w = build(&student, &teacher, &options, &Threads::one()).unwrap();
        prop_assert_eq!(w.indptr.len(), student.vocab.len() + 1);
        for s in 0..student.vocab.len() {
            let row = w.indptr[s] as usize..w.indptr[s + 1] as usize;
            prop_assert!(row.len() <= top_k && !row.is_empty());
            let weights = &w.weights[row.clone()];
            prop_assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            prop_assert!(weights.is_sorted_by(|a, b| a >= b));
            let ids = &w.indices[row];
            prop_assert!(ids.iter().all(|&t| (t as usize) < teacher.vocab.len()));
            prop_assert!((1..ids.len()).all(|at| !ids[..at].contains(&ids[at])));
            if w.rules[s] == Rule::Exact && reverse != Reverse::All {
                let same = teacher.vocab.token_bytes(ids[0] as u32);
                prop_assert_eq!(student.vocab.token_bytes(s as u32), same);
                prop_assert_eq!(ids.len(), 1);
            }
        }
    }

    #[test]
    fn of_pieces_with_even_weights_the_first_stay_first(
        student in tokens(),
        teacher in tokens(),
        top_k in 1..5usize,
        max_pieces in 1..8usize,
    ) {
        let (student, teacher) = (ranked(&student), ranked(&teacher));
        let options = Options { decay: 1.0, top_k, max_pieces, ..Options::default() };
        let w = build(&student, &teacher, &options, &Threads::one()).unwrap();
        for s in 0..student.vocab.len() {
            let pieces = w.pieces.of(s as u32);
            let mut counts: Vec<(i64, usize)> = Vec::new();
            for &piece in &pieces[..pieces.len().min(max_pieces)] {
                match counts.iter_mut().find(|(t, _)| *t == i64::from(piece)) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((i64::from(piece), 1)),
                }
            }
            counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
            let expected: Vec<i64> = counts.iter().map(|&(t, _)| t).take(top_k).collect();
            prop_assert_eq!(&w.indices[w.indptr[s] as usize..w.indptr[s + 1] as usize], expected);
        }
    }

    #[test]
    fn equal_vocabularies_give_the_identity(tokens in tokens()) {
        let tokenizer = ranked(&tokens);
        let w = build(&tokenizer, &tokenizer, &Options::default(), &Threads::one()).unwrap();
        let identity: Vec<i64> = (0..tokenizer.vocab.len() as i64).collect();
        prop_assert_eq!(w.indices, identity);
        prop_assert!(w.rules.iter().all(|&rule| rule == Rule::Exact));
    }

    #[test]
    fn a_model_is_the_same_after_it_was_stored(tokens in tokens(), word in token()) {
        let tokenizer = ranked(&tokens);
        let stored = postcard::to_stdvec(&tokenizer).unwrap();
        let back: Tokenizer = postcard::from_bytes(&stored).unwrap();
        prop_assert_eq!(back.segment(&word).unwrap(), tokenizer.segment(&word).unwrap());
        prop_assert_eq!(back.model_fingerprint(), tokenizer.model_fingerprint());
    }

    #[test]
    fn altered_stored_bytes_are_an_error_or_a_tokenizer_but_never_a_panic(
        tokens in tokens(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut stored = postcard::to_stdvec(&ranked(&tokens)).unwrap();
        let at = at.index(stored.len());
        stored[at] = byte;
        if let Ok(tokenizer) = postcard::from_bytes::<Tokenizer>(&stored) {
            let _ = tokenizer.segment(b"abcdabcd");
            let _ = build(&tokenizer, &tokenizer, &Options::default(), &Threads::one());
        }
    }

    #[test]
    fn altered_tokenizer_files_are_an_error_or_a_tokenizer_but_never_a_panic(
        which in 0..FILES.len(),
        at in any::<prop::sample::Index>(),
        text in "[\\[\\]{}\",:0-9a-z<>▁ ]{0,3}",
        word in "[a-c▁ é]{1,8}",
    ) {
        let file = FILES[which];
        let mut at = at.index(file.len());
        while !file.is_char_boundary(at) {
            at -= 1;
        }
        let mut end = (at + 2).min(file.len());
        while !file.is_char_boundary(end) {
            end += 1;
        }
        let altered = format!("{}{text}{}", &file[..at], &file[end..]);
        if let Ok(tokenizer) = Tokenizer::from_json(altered.as_bytes(), Scores::FromFile) {
            let _ = tokenizer.segment(word.as_bytes());
            let _ = tokenizer.segment(b"\xff\xe2");
        }
    }
}

const METASPACE: &str = r#""decoder": {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"}]}"#;

const FILES: [&str; 3] = [
    r#"{"decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
        "vocab": {"<unk>": 0, "<0xFF>": 1, "a": 2, "b": 3, "ab": 4, "▁": 5, "▁ab": 6},
        "merges": ["a b", "▁ ab"]}}"#,
    r#"{"decoder": {"type": "Metaspace", "replacement": "▁"}, "model": {"type": "Unigram",
        "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5], ["ab", -2.5], ["▁", -2.0]]}}"#,
    r###"{"decoder": {"type": "WordPiece", "prefix": "##"}, "model": {"type": "WordPiece",
        "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "##b": 2, "##bc": 3}}}"###,
];

fn from_json(json: &str) -> Tokenizer {
    Tokenizer::from_json(json.as_bytes(), Scores::FromFile).unwrap()
}

fn spelled(tokenizer: &Tokenizer, word: &[u8]) -> Option<Vec<u32>> {
    tokenizer.segment(word).unwrap()
}

#[test]
fn sentencepiece_bpe_falls_back_to_bytes_and_gives_up_without_them() {
    let tokenizer = from_json(FILES[0]);
    assert_eq!(spelled(&tokenizer, b" abab"), Some(vec![6, 4]));
    assert_eq!(spelled(&tokenizer, b"a\xffb"), Some(vec![2, 1, 3]));
    assert_eq!(spelled(&tokenizer, b"ac"), None);
    assert_eq!(spelled(&tokenizer, b"\xfe"), None);
    assert_eq!(spelled(&tokenizer, "▁".as_bytes()), None);
    assert_eq!(spelled(&tokenizer, b""), Some(Vec::new()));
}

#[test]
fn unigram_takes_the_most_probable_segmentation() {
    let tokenizer = from_json(FILES[1]);
    assert_eq!(spelled(&tokenizer, b" aab"), Some(vec![3, 1, 2]));
    assert_eq!(spelled(&tokenizer, b"b"), None);
}

#[test]
fn unigram_agrees_with_all_segmentations_tried_one_by_one() {
    let json = format!(
        r#"{{{METASPACE}, "model": {{"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -2.0],
            ["b", -2.25], ["aa", -3.0], ["ab", -3.5], ["ba", -4.75], ["aab", -4.25],
            ["bab", -5.5]]}}}}"#
    );
    let tokenizer = from_json(&json);
    let scores = [0.0, -2.0, -2.25, -3.0, -3.5, -4.75, -4.25, -5.5];
    let score = |pieces: &[u32]| pieces.iter().map(|&id| scores[id as usize]).sum::<f64>();
    for bits in 0..1 << 9 {
        let word: Vec<u8> = (0..9)
            .map(|at| if bits >> at & 1 == 0 { b'a' } else { b'b' })
            .collect();
        let found = spelled(&tokenizer, &word).unwrap();
        let mut best = f64::NEG_INFINITY;
        all_spellings(&tokenizer, &word, &mut Vec::new(), &mut |pieces| {
            best = best.max(score(pieces));
        });
        assert_eq!(score(&found), best, "{word:?}");
    }
}

fn all_spellings(
    tokenizer: &Tokenizer,
    rest: &[u8],
    pieces: &mut Vec<u32>,
    found: &mut impl FnMut(&[u32]),
) {
    if rest.is_empty() {
        return found(pieces);
    }
    for length in 1..=rest.len() {
        if let Some(id) = tokenizer.vocab.id_of(&rest[..length]) {
            pieces.push(id);
            all_spellings(tokenizer, &rest[length..], pieces, found);
            pieces.pop();
        }
    }
}

#[test]
fn wordpiece_matches_the_longest_first_and_knows_words_from_continuations() {
    let tokenizer = from_json(FILES[2]);
    assert_eq!(spelled(&tokenizer, b" abc"), Some(vec![1, 3]));
    assert_eq!(spelled(&tokenizer, b"bbc"), Some(vec![2, 3]));
    assert_eq!(spelled(&tokenizer, b"b a"), Some(vec![2, 1]));
    assert_eq!(spelled(&tokenizer, b"a"), None);
    assert_eq!(spelled(&tokenizer, b" "), None);
    assert_eq!(spelled(&tokenizer, b" \xff"), None);
}

#[test]
fn models_that_are_not_supported_leave_the_vocabulary_usable() {
    let json = r#"{"decoder": {"type": "ByteLevel"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
    let tokenizer = from_json(json);
    assert!(tokenizer.model.is_none());
    let error = tokenizer.segment(b"ab").unwrap_err();
    assert!(matches!(&error, Error::Unsupported { found, .. } if found == "WordLevel"));
}

#[test]
fn merges_that_are_damaged_name_their_rank() {
    let with = |merges: &str| {
        let json = format!(
            r#"{{"decoder": {{"type": "ByteLevel"}}, "model": {{"type": "BPE",
                "vocab": {{"a": 0, "b": 1, "ab": 2}}, "merges": {merges}}}}}"#
        );
        Tokenizer::from_json(json.as_bytes(), Scores::FromFile)
    };
    assert!(with(r#"["a b"]"#).is_ok());
    assert!(with(r#"[["a", "b"]]"#).is_ok());
    for (merges, expected) in [
        (r#"["a b", "ab"]"#, "merge 1: \"ab\" is not two tokens"),
        (r#"["a b c"]"#, "merge 0: \"a b c\" is not two tokens"),
        (r#"["a c"]"#, "merge 0: \"c\" is not in the vocabulary"),
        (
            r#"[["b", "a"]]"#,
            "merge 0: \"ba\" is not in the vocabulary",
        ),
        (r#"[["a"]]"#, "the merges"),
        (r#"{"a": 1}"#, "the merges"),
    ] {
        let error = with(merges).unwrap_err().to_string();
        assert!(error.contains(expected), "{merges}: {error}");
    }
}

#[test]
fn of_equal_tokens_the_row_goes_to_the_one_that_the_model_emits() {
    // Added text wins over the model, and the model's own token over an earlier equal one.
    let json = r#"{"decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 4, "content": "b b", "special": false}],
        "model": {"type": "BPE", "vocab": {"bĠb": 0, "b": 1, "Ġ": 2, "Ġb": 3}, "merges": ["Ġ b"]}}"#;
    let teacher = from_json(json);
    assert_eq!(teacher.vocab.id_of(b"b b"), Some(0));
    assert_eq!(teacher.id_of(b"b b"), Some(4));
    let student = ranked(&[]);
    let w = build(&teacher, &teacher, &Options::default(), &Threads::one()).unwrap();
    assert_eq!(w.indices, [4, 1, 2, 3, 4]);
    assert_eq!(w.rules[0], Rule::Duplicate);
    assert!(build(&student, &teacher, &Options::default(), &Threads::one()).is_ok());
}

#[test]
fn options_outside_their_range_are_refused_by_name() {
    let tokenizer = ranked(&[]);
    for (options, expected) in [
        (
            Options {
                top_k: 0,
                ..Options::default()
            },
            "top_k = 0",
        ),
        (
            Options {
                max_pieces: 0,
                ..Options::default()
            },
            "max_pieces = 0",
        ),
        (
            Options {
                decay: -0.5,
                ..Options::default()
            },
            "decay = -0.5",
        ),
        (
            Options {
                decay: f64::NAN,
                ..Options::default()
            },
            "decay = NaN",
        ),
        (
            Options {
                name_similarity: -1.0,
                ..Options::default()
            },
            "name_similarity = -1",
        ),
        (
            Options {
                special_pairs: vec![(0, 9)],
                ..Options::default()
            },
            "token id 9 is outside",
        ),
    ] {
        let error = build(&tokenizer, &tokenizer, &options, &Threads::one())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn canonical_differences_vanish_in_the_rows() {
    let text = |tokens: &[&str]| {
        let tokens = tokens
            .iter()
            .map(|token| Token::Text(token.as_bytes().to_vec()));
        Tokenizer::from_tokens(tokens, true).unwrap()
    };
    let (student, teacher) = (text(&[" ,", "The", "x"]), text(&["the", ",", "x", "The "]));
    let canonical = Canonical {
        punctuation_space: true,
        case: true,
    };
    let options = Options {
        canonical,
        ..Options::default()
    };
    let w = build(&student, &teacher, &options, &Threads::one()).unwrap();
    assert_eq!(w.indices, [1, 0, 2]);
    assert_eq!(w.rules, [Rule::Canonical, Rule::Canonical, Rule::Exact]);
}

#[test]
fn the_models_of_files_and_ranks_are_named_and_told_apart() {
    let names: Vec<&str> = FILES
        .iter()
        .map(|file| from_json(file).model.map_or("none", |model| model.name()))
        .collect();
    assert_eq!(names, ["BPE", "Unigram", "WordPiece"]);
    let digests: Vec<[u8; 32]> = FILES
        .iter()
        .filter_map(|file| {
            let tokenizer = from_json(file);
            Some(tokenizer.model.as_ref()?.digest(&tokenizer.vocab))
        })
        .collect();
    assert!(digests[0] != digests[1] && digests[1] != digests[2]);
    assert_eq!(Model::from_ranks(&ranked(&[]).vocab).name(), "BPE");
}
