//! How the strings of a vocabulary stand for bytes.
//! Knows single pieces only: no ids, no sequences, no added tokens.

use tokenizers::DecoderWrapper;

/// The alphabet of a vocabulary, as its decoder tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pieces {
    /// GPT-2's: each byte is one printable character, a blank is `Ġ`.
    ByteLevel,
    /// SentencePiece's: a blank is `▁`, a byte without a piece is `<0xNN>`.
    Metaspace {
        /// The first blank of a sequence is the tokenizer's own and is not text.
        strip_leading: bool,
    },
    /// BERT's: `##` continues a word. Not reversible; for embedders only.
    WordPiece,
}

impl Pieces {
    /// Reads the alphabet off a decoder, or says what was expected and found.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, String> {
        let found = match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => return Ok(Self::ByteLevel),
            Some(DecoderWrapper::WordPiece(_)) => return Ok(Self::WordPiece),
            Some(DecoderWrapper::Metaspace(metaspace)) => {
                use tokenizers::pre_tokenizers::metaspace::PrependScheme;
                let strip_leading = metaspace.prepend_scheme != PrependScheme::Never;
                return Ok(Self::Metaspace { strip_leading });
            }
            Some(DecoderWrapper::Sequence(sequence)) => {
                let parts = sequence.get_decoders();
                let has = |test: fn(&DecoderWrapper) -> bool| parts.iter().any(test);
                if has(|part| matches!(part, DecoderWrapper::ByteLevel(_))) {
                    return Ok(Self::ByteLevel);
                }
                if has(|part| matches!(part, DecoderWrapper::ByteFallback(_))) {
                    let strip_leading =
                        has(|part| matches!(part, DecoderWrapper::Strip(strip) if strip.start > 0));
                    return Ok(Self::Metaspace { strip_leading });
                }
                "a sequence without either"
            }
            Some(_) => "another",
            None => "none",
        };
        Err(format!(
            "decoder: expected ByteLevel, ByteFallback, Metaspace or WordPiece, got {found}"
        ))
    }

    /// The bytes of one piece that is not an added token.
    pub(super) fn bytes(self, piece: &str) -> Vec<u8> {
        match self {
            // A piece with a character outside the alphabet stands for itself, as the decoder of
            // `tokenizers` has it.
            Self::ByteLevel => piece
                .chars()
                .map(byte_of_char)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| piece.as_bytes().to_vec()),
            Self::Metaspace { .. } => match fallback_byte(piece) {
                Some(byte) => vec![byte],
                None => piece.replace('▁', " ").into_bytes(),
            },
            Self::WordPiece => match piece.strip_prefix("##") {
                Some(rest) => rest.as_bytes().to_vec(),
                None => format!(" {piece}").into_bytes(),
            },
        }
    }

    /// The piece that stands for one byte.
    pub(super) fn of_byte(self, byte: u8) -> String {
        match self {
            Self::ByteLevel => char_of_byte(byte).to_string(),
            Self::Metaspace { .. } => format!("<0x{byte:02X}>"),
            Self::WordPiece => char::from(byte).to_string(),
        }
    }
}

/// GPT-2's map from bytes to printable characters: printable Latin-1 stands for itself, the other
/// 68 bytes follow from U+0100 on. Source: `bytes_to_unicode` in openai/gpt-2, `src/encoder.py`.
fn char_of_byte(byte: u8) -> char {
    let code = u32::from(byte);
    let shifted = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0x00..=0x20 => 0x100 + code,
        0x7F..=0xA0 => 0x121 + code - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(shifted).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn byte_of_char(char: char) -> Option<u8> {
    let byte = match u32::from(char) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => code,
        code @ 0x100..=0x120 => code - 0x100,
        code @ 0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a piece `<0xNN>`.
fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character_and_comes_back() {
        let mut seen = std::collections::HashSet::new();
        for byte in 0..=u8::MAX {
            let char = char_of_byte(byte);
            assert!(seen.insert(char) && !char.is_whitespace() && !char.is_control(), "{byte}");
            assert_eq!(byte_of_char(char), Some(byte));
        }
        assert_eq!(char_of_byte(b' '), 'Ġ');
        assert_eq!(char_of_byte(b'\n'), 'Ċ');
        assert_eq!(byte_of_char('漢'), None);
    }

    #[test]
    fn sentencepiece_bytes_and_blanks_are_undone() {
        let pieces = Pieces::Metaspace { strip_leading: true };
        for (piece, bytes) in [
            ("▁a▁", &b" a "[..]),
            ("<0x0A>", b"\n"),
            ("<0xfF>", b"\xff"),
            ("<0x0A", b"<0x0A"),
            ("<0x+1>", b"<0x+1>"),
            ("<0x0AB>", b"<0x0AB>"),
        ] {
            assert_eq!(pieces.bytes(piece), bytes, "{piece}");
        }
        assert_eq!(pieces.of_byte(10), "<0x0A>");
    }
}
