//! The bytes each token stands for, and which tokens are control tokens.

/// The bytes of each token, one after the other.
#[derive(Default)]
pub(crate) struct Table {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    control: Vec<bool>,
}

impl Table {
    pub(crate) fn with_capacity(tokens: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(8 * tokens),
            ends: Vec::with_capacity(tokens),
            control: Vec::with_capacity(tokens),
        }
    }

    pub(crate) fn push(&mut self, piece: &[u8], control: bool) {
        self.extend(control, |bytes| bytes.extend_from_slice(piece));
    }

    /// Adds the token whose bytes `write` appends.
    pub(crate) fn extend(&mut self, control: bool, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len());
        self.control.push(control);
    }

    /// The bytes of `id`; none for an id outside the vocabulary.
    pub(crate) fn piece(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let start = i.checked_sub(1).and_then(|i| self.ends.get(i)).copied();
        match self.ends.get(i) {
            Some(&end) => &self.bytes[start.unwrap_or(0)..end],
            None => &[],
        }
    }

    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).is_some_and(|&c| c)
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// The byte that SentencePiece writes as `<0x0A>`.
pub(crate) fn byte_of_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}
