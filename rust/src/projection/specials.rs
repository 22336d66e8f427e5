//! Pairs of special tokens: those that the caller declares, then by role, then by name.

use super::{Options, Rule};
use crate::vocab::Role;
use crate::vocab::{TokenKind, Vocab};

/// (student id, teacher id, the rule that paired them).
pub(super) type Pair = (u32, u32, Rule);

pub(super) fn pair(student: &Vocab, teacher: &Vocab, options: &Options) -> Vec<Pair> {
    let mut pairs: Vec<Pair> = options
        .special_pairs
        .iter()
        .map(|&(s, t)| (s, t, Rule::Role))
        .collect();
    for role in Role::ALL {
        let (Some(s), Some(t)) = (student.role(role), teacher.role(role)) else {
            continue;
        };
        // Many tokenizers declare their EOS as padding or unknown token too; another tokenizer's
        // padding does not correspond to an EOS.
        let borrowed = matches!(role, Role::Pad | Role::Unk)
            && plays_another(teacher, role, t)
            && !plays_another(student, role, s);
        if !options.ignored_roles.contains(&role)
            && !borrowed
            && student.kind(s) == TokenKind::Special
            && pairs.iter().all(|pair| pair.0 != s)
        {
            pairs.push((s, t, Rule::Role));
        }
    }
    by_name(student, teacher, options.name_similarity, &mut pairs);
    pairs
}

fn plays_another(vocab: &Vocab, role: Role, id: u32) -> bool {
    Role::ALL
        .into_iter()
        .any(|other| other != role && vocab.role(other) == Some(id))
}

/// Pairs what is left one to one, the most similar names first, of equals the lowest ids.
fn by_name(student: &Vocab, teacher: &Vocab, threshold: f64, pairs: &mut Vec<Pair>) {
    if threshold > 1.0 {
        return;
    }
    let student: Vec<(u32, Name)> = names(student, |id| pairs.iter().any(|pair| pair.0 == id));
    let teacher: Vec<(u32, Name)> = names(teacher, |id| pairs.iter().any(|pair| pair.1 == id));
    let mut candidates: Vec<(f64, usize, usize)> = Vec::new();
    for (s, (_, student_name)) in student.iter().enumerate() {
        for (t, (_, teacher_name)) in teacher.iter().enumerate() {
            let similarity = student_name.similarity(teacher_name);
            if similarity >= threshold {
                candidates.push((similarity, s, t));
            }
        }
    }
    candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut student_free = vec![true; student.len()];
    let mut teacher_free = vec![true; teacher.len()];
    for (_, s, t) in candidates {
        if student_free[s] && teacher_free[t] {
            (student_free[s], teacher_free[t]) = (false, false);
            pairs.push((student[s].0, teacher[t].0, Rule::Name));
        }
    }
}

fn names(vocab: &Vocab, taken: impl Fn(u32) -> bool) -> Vec<(u32, Name)> {
    vocab
        .specials()
        .filter(|&(id, _)| !taken(id))
        .map(|(id, text)| (id, Name::new(text)))
        .filter(|(_, name)| !name.joined.is_empty())
        .collect()
}

/// The words of a special token's text, without brackets, case and order.
struct Name {
    /// All of it in its own order: `end_of_text` is `endoftext`.
    joined: String,
    words: Vec<String>,
    /// `<extra_id_1>` and `<extra_id_2>` are nothing alike.
    numbers: Vec<String>,
}

impl Name {
    fn new(text: &str) -> Self {
        let mut parts: Vec<String> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect();
        let joined = parts.concat();
        parts.sort_unstable();
        parts.dedup();
        let (numbers, words) = parts
            .into_iter()
            .partition(|word| word.chars().any(|c| c.is_numeric()));
        Self {
            joined,
            words,
            numbers,
        }
    }

    /// The Jaccard index of the words; 0 where the numbers differ.
    fn similarity(&self, other: &Self) -> f64 {
        if self.joined == other.joined {
            return 1.0;
        }
        if self.numbers != other.numbers {
            return 0.0;
        }
        let common = self
            .words
            .iter()
            .filter(|word| other.words.contains(word))
            .count();
        let all = self.words.len() + other.words.len() - common;
        if all == 0 {
            1.0
        } else {
            common as f64 / all as f64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::{DummyPrefix, Spelling, VocabBuilder};

    fn vocab(specials: &[&str]) -> Vocab {
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        for special in specials {
            builder.push_special(special).unwrap();
        }
        builder.build()
    }

    #[test]
    fn roles_go_before_names_and_names_pair_one_to_one() {
        let student = vocab(&[
            "<s>",
            "<fim_prefix>",
            "<tool_call>",
            "<extra_id_1>",
            "<odd>",
        ]);
        let teacher = vocab(&[
            "<extra_id_2>",
            "<|begin_of_text|>",
            "<|fim_prefix|>",
            "<|tool_call_begin|>",
            "<extra_id_1>",
        ]);
        let pairs = pair(&student, &teacher, &Options::default());
        assert_eq!(
            pairs,
            [
                (0, 1, Rule::Role),
                (1, 2, Rule::Name),
                (3, 4, Rule::Name),
                (2, 3, Rule::Name)
            ]
        );
    }

    #[test]
    fn names_that_differ_in_brackets_and_word_breaks_alone_are_equal() {
        let same = |a, b| Name::new(a).similarity(&Name::new(b)) == 1.0;
        assert!(same("<|end_of_text|>", "<|endoftext|>"));
        assert!(same("<｜fim▁hole｜>", "<fim_hole>"));
        assert_eq!(Name::new("<a_1>").similarity(&Name::new("<a_2>")), 0.0);
    }

    #[test]
    fn padding_that_is_borrowed_from_another_role_pairs_with_its_like_only() {
        let mut teacher = vocab(&["</s>"]);
        teacher.set_role(Role::Pad, Some(0)).unwrap();
        let student = vocab(&["<pad>", "</s>"]);
        assert_eq!(
            pair(&student, &teacher, &Options::default()),
            [(1, 0, Rule::Role)]
        );
        assert_eq!(
            pair(&teacher, &teacher, &Options::default()),
            [(0, 0, Rule::Role)]
        );
    }

    #[test]
    fn a_declared_pair_replaces_the_role_and_a_role_can_be_ignored() {
        let (student, teacher) = (vocab(&["<s>", "</s>"]), vocab(&["<a>", "<bos>", "<eos>"]));
        let options = Options {
            special_pairs: vec![(0, 0)],
            ignored_roles: vec![Role::Eos],
            ..Options::default()
        };
        assert_eq!(pair(&student, &teacher, &options), [(0, 0, Rule::Role)]);
    }
}
