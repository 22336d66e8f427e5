//! Where a long token occurs in a text: in time that grows with both and not with their product.

/// Tokens up to this many bytes are looked up at each place of a text; longer ones are searched for.
pub(super) const SHORT_TOKEN: usize = 256;

/// Calls `found` with each place at which `token` starts in `text`, in order. Knuth, Morris, Pratt.
pub(super) fn occurrences(text: &[u8], token: &[u8], mut found: impl FnMut(usize)) {
    if token.is_empty() || token.len() > text.len() {
        return;
    }
    // Length of the longest proper border of each prefix.
    let mut border = vec![0u32; token.len()];
    let mut matched = 0;
    for at in 1..token.len() {
        while matched > 0 && token[at] != token[matched] {
            matched = border[matched - 1] as usize;
        }
        matched += usize::from(token[at] == token[matched]);
        border[at] = matched as u32;
    }
    matched = 0;
    for (at, &byte) in text.iter().enumerate() {
        while matched == token.len() || matched > 0 && byte != token[matched] {
            matched = border[matched - 1] as usize;
        }
        matched += usize::from(byte == token[matched]);
        if matched == token.len() {
            found(at + 1 - token.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_places_are_found_overlapping_ones_too() {
        for (text, token) in [
            ("aaaaa", "aa"),
            ("abababa", "aba"),
            ("abc", "abcd"),
            ("abc", ""),
            ("aabaaabaaab", "aaab"),
            ("x", "x"),
        ] {
            let mut found = Vec::new();
            occurrences(text.as_bytes(), token.as_bytes(), |at| found.push(at));
            let plain: Vec<usize> = (0..text.len())
                .filter(|&at| !token.is_empty() && text[at..].starts_with(token))
                .collect();
            assert_eq!(found, plain, "{text} {token}");
        }
    }
}
