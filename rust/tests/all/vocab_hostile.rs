//! Damaged and hostile vocabulary files: an error or a vocabulary that works, never a panic or a
//! hang.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use xtoken::segment::Scores;
use xtoken::{AlignOptions, Aligner, Tokenizer};

use crate::common::draws;

/// A small file of each form.
const FILES: [&str; 6] = [
    r#"{"added_tokens":[{"id":6,"content":"<s>","special":true},{"id":8,"content":"ab","special":false}],
        "normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},
        "decoder":{"type":"ByteLevel"},
        "model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"Ġ":3,"Ġa":4,"Ã":5},"merges":["a b","Ġ a"]}}"#,
    r#"{"added_tokens":[{"id":0,"content":"<unk>","special":true},{"id":1,"content":"<s>","special":true}],
        "normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},
        {"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,
        "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
        {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
        "model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,
        "vocab":{"<unk>":0,"<s>":1,"<0x0A>":2,"▁":3,"a":4,"▁a":5},"merges":[["▁","a"]]}}"#,
    r#"{"added_tokens":[{"id":0,"content":"<unk>","special":true}],"normalizer":null,
        "pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always"},
        "decoder":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always"},
        "model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["▁",-2.5],["a",-1.0],["▁a",-3.0]]}}"#,
    r###"{"added_tokens":[{"id":0,"content":"[UNK]","special":true}],"normalizer":null,
        "pre_tokenizer":{"type":"BertPreTokenizer"},"decoder":{"type":"WordPiece","prefix":"##"},
        "model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##",
        "max_input_chars_per_word":100,"vocab":{"[UNK]":0,"a":1,"##b":2,"ab":3}}}"###,
    "YQ== 0\nYg== 1\nYWI= 2\nIA== 3\n",
    r#"{"config":{"default_vocab_size":6,"default_num_special_tokens":2,"pattern":"."},
        "vocab":[{"rank":0,"token_bytes":"YQ=="},{"rank":1,"token_bytes":"Yg=="},{"rank":2,"token_bytes":"YWI="}],
        "special_tokens":[{"rank":0,"token_str":"<s>"},{"rank":1,"token_str":"</s>"}]}"#,
];

/// What a value may be replaced by.
const PIECES: [&str; 22] = [
    "null",
    "true",
    "-1",
    "0",
    "1",
    "7",
    "1048577",
    "4294967295",
    "4294967296",
    "1e308",
    "-1e400",
    "\"\"",
    "\"▁\"",
    "\"<0xZZ>\"",
    "\"<0xFF>\"",
    "\"a\\u0000\"",
    "[]",
    "{}",
    "[[]]",
    ",",
    "}",
    "\"a b c\"",
];

/// Parts of a file by which a mutation starts or ends: its values and its names.
fn cuts(file: &[u8]) -> Vec<usize> {
    let is_mark = |byte: &u8| b"{}[],:\n ".contains(byte);
    (0..=file.len())
        .filter(|&at| at == 0 || at == file.len() || is_mark(&file[at]) || is_mark(&file[at - 1]))
        .collect()
}

fn file() -> impl Strategy<Value = Vec<u8>> {
    let mutation = (
        any::<Index>(),
        0..4usize,
        prop::option::of(prop::sample::select(&PIECES[..])),
    );
    let bytes = vec((any::<Index>(), any::<u8>()), 0..2);
    let mutated = (prop::sample::select(&FILES[..]), vec(mutation, 0..4), bytes).prop_map(
        |(file, mutations, bytes)| {
            let mut file = file.as_bytes().to_vec();
            for (at, length, piece) in mutations {
                let cuts = cuts(&file);
                let first = at.index(cuts.len());
                let (start, end) = (cuts[first], cuts[(first + length).min(cuts.len() - 1)]);
                file.splice(start..end, piece.unwrap_or_default().bytes());
            }
            for (at, byte) in bytes {
                if !file.is_empty() {
                    let at = at.index(file.len());
                    file[at] = byte;
                }
            }
            file
        },
    );
    prop_oneof![9 => mutated, 1 => vec(any::<u8>(), 0..200)]
}

/// Uses a tokenizer in every way that its bytes can be used.
fn exercise(tokenizer: &Tokenizer, text: &[u8], picks: &[Index]) {
    let vocab = Arc::new(tokenizer.vocab.clone());
    if vocab.is_empty() {
        return;
    }
    let id = |pick: &Index| pick.index(vocab.len()) as i64;
    let mut ids: Vec<i64> = picks.iter().map(id).collect();
    let bytes = vocab.decode_bytes(&ids).unwrap();
    for text in [text, &bytes] {
        if let Ok(Some(pieces)) = tokenizer.segment(text) {
            ids.extend(pieces.into_iter().map(i64::from));
        }
    }
    let _ = (
        tokenizer.id_of(text),
        vocab.fingerprint(),
        tokenizer.model_fingerprint(),
    );
    let aligner = Aligner::new(vocab.clone(), vocab, AlignOptions::default()).unwrap();
    let half = ids.len() / 2;
    let batch = aligner.align(&ids[..half], &ids[half..]).unwrap();
    assert_eq!(batch.student_bounds.last(), Some(&(half as i64)));
}

proptest! {
    #![proptest_config(draws(3000))]

    #[test]
    fn any_file_is_an_error_or_a_vocabulary_that_works(
        file in file(),
        text in vec(prop::sample::select(&b"ab \n\xC3\xA9"[..]), 0..20),
        picks in vec(any::<Index>(), 0..30),
    ) {
        let specials = [("<s>".to_owned(), 4)];
        let read = [
            Tokenizer::from_json(&file, Scores::FromFile),
            Tokenizer::from_tiktoken(&file, &specials),
            Tokenizer::from_tekken(&file),
        ];
        for tokenizer in read {
            match tokenizer {
                Ok(tokenizer) => exercise(&tokenizer, &text, &picks),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}

#[test]
fn the_files_that_are_damaged_are_whole_to_begin_with() {
    for file in &FILES[..4] {
        Tokenizer::from_json(file.as_bytes(), Scores::FromFile).unwrap();
    }
    Tokenizer::from_tiktoken(FILES[4].as_bytes(), &[]).unwrap();
    Tokenizer::from_tekken(FILES[5].as_bytes()).unwrap();
}
