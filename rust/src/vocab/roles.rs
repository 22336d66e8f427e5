//! The roles of special tokens.

/// What a special token is for. Specials of two tokenizers correspond by role, never by looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Begin of sequence.
    Bos,
    /// End of sequence.
    Eos,
    /// Padding.
    Pad,
    /// Unknown token.
    Unk,
    /// End of a chat turn.
    EndOfTurn,
}

impl Role {
    /// All roles, in order.
    pub const ALL: [Role; 5] = [Role::Bos, Role::Eos, Role::Pad, Role::Unk, Role::EndOfTurn];

    /// The role's name in the Python API and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Bos => "bos",
            Role::Eos => "eos",
            Role::Pad => "pad",
            Role::Unk => "unk",
            Role::EndOfTurn => "eot",
        }
    }

    /// The role with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }

    /// The role that a special token's text gives away in the families that are known; `None`
    /// elsewhere. A tokenizer's own declaration goes before this.
    #[must_use]
    pub fn guess(text: &str) -> Option<Role> {
        match text {
            "<s>"
            | "<bos>"
            | "<|begin_of_text|>"
            | "<｜begin▁of▁sentence｜>"
            | "<|startoftext|>" => Some(Role::Bos),
            "</s>" | "<eos>" | "<|end_of_text|>" | "<｜end▁of▁sentence｜>" | "<|endoftext|>" => {
                Some(Role::Eos)
            }
            "<pad>" | "[PAD]" | "<｜▁pad▁｜>" | "<|finetune_right_pad_id|>" => {
                Some(Role::Pad)
            }
            "<unk>" | "[UNK]" => Some(Role::Unk),
            "<|im_end|>" | "<|eot_id|>" | "<end_of_turn>" | "<|eot|>" | "<|end|>" => {
                Some(Role::EndOfTurn)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_have_names_that_read_back() {
        for role in Role::ALL {
            assert_eq!(Role::from_name(role.name()), Some(role));
        }
        assert_eq!(Role::from_name("BOS"), None);
    }
}
