//! Encryption at rest: the key that a caller gives, and the sealing of single records.
//! Knows nothing of what a record means; XChaCha20-Poly1305 of the crate `chacha20poly1305` does the work.

use std::fmt;

use chacha20poly1305::aead::{Aead, Generate, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use crate::{Error, Result};

/// Length of a nonce: random ones of 24 bytes do not meet by chance, however many records a key seals.
const NONCE_BYTES: usize = 24;
/// Length of the tag that proves a record whole.
const TAG_BYTES: usize = 16;
/// What sealing adds to a record.
pub(crate) const SEAL_BYTES: usize = NONCE_BYTES + TAG_BYTES;
/// What the check of a key is bound to: no record's key, so that it never passes for one.
const CHECK_CONTEXT: &[u8] = b"mka-memory key check";

/// The key of an encrypted store: 32 bytes that nobody can guess.
///
/// A password is none: derive a key from it first, with a function made for it such as Argon2.
/// The bytes are overwritten in memory when the key is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct EncryptionKey(Zeroizing<[u8; 32]>);

impl EncryptionKey {
    /// A key of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EncryptionKey(..)")
    }
}

/// Seals and opens records under one key.
pub(crate) struct Cipher(XChaCha20Poly1305);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    pub(crate) fn new(key: &EncryptionKey) -> Self {
        Self(XChaCha20Poly1305::new(&(*key.0).into()))
    }

    /// `nonce | ciphertext | tag`; it opens only in the same `context`.
    pub(crate) fn seal(&self, context: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        let nonce = XNonce::try_generate().map_err(|source| {
            Error::new(crate::ErrorKind::Storage, format!("encrypt: no random numbers: {source}"))
        })?;
        let sealed = self.0.encrypt(&nonce, Payload { msg: plain, aad: context });
        let sealed = sealed.map_err(|_| Error::invalid("encrypt: the record is too long"))?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// What [`seal`](Self::seal) sealed in `context`; `Corrupted` for anything else.
    pub(crate) fn open(&self, context: &[u8], sealed: &[u8]) -> Result<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or_else(|| {
            Error::corrupted(format!(
                "decrypt: expected {SEAL_BYTES} bytes or more, got {}",
                sealed.len()
            ))
        })?;
        let plain = self.0.decrypt(&XNonce::from(*nonce), Payload { msg: sealed, aad: context });
        plain.map_err(|_| Error::corrupted("decrypt: the record does not match its tag"))
    }

    /// Bytes by which another opening can tell whether it has the same key.
    pub(crate) fn check(&self) -> Result<Vec<u8>> {
        self.seal(CHECK_CONTEXT, &[])
    }

    pub(crate) fn matches(&self, check: &[u8]) -> bool {
        self.open(CHECK_CONTEXT, check).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(byte: u8) -> Cipher {
        Cipher::new(&EncryptionKey::new([byte; 32]))
    }

    #[test]
    fn a_record_opens_with_its_key_in_its_context_and_nowhere_else() {
        let sealed = cipher(1).seal(b"here", b"badger").unwrap();
        assert_eq!(sealed.len(), 6 + SEAL_BYTES);
        assert_eq!(cipher(1).open(b"here", &sealed).unwrap(), b"badger");
        assert!(cipher(2).open(b"here", &sealed).is_err());
        assert!(cipher(1).open(b"there", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert!(cipher(1).open(b"here", &damaged).is_err());
            assert!(cipher(1).open(b"here", &sealed[..at]).is_err());
        }
    }

    #[test]
    fn the_same_record_is_sealed_differently_each_time() {
        assert_ne!(cipher(1).seal(b"", b"x").unwrap(), cipher(1).seal(b"", b"x").unwrap());
    }

    #[test]
    fn a_check_tells_keys_apart_and_a_debug_print_tells_nothing() {
        let check = cipher(1).check().unwrap();
        assert!(cipher(1).matches(&check) && !cipher(2).matches(&check));
        assert!(!format!("{:?}", EncryptionKey::new([77; 32])).contains("77"));
    }

    /// Appendix A.3.1 of draft-irtf-cfrg-xchacha-03, under a nonce that is given.
    #[test]
    fn sealing_is_the_published_cipher() {
        let key: Vec<u8> = (0x80..=0x9f).collect();
        let nonce: Vec<u8> = (0x40..=0x57).collect();
        let cipher = Cipher::new(&EncryptionKey::new(key.try_into().unwrap()));
        let context = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let plain = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.";
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().unwrap();
        let payload = Payload { msg: plain, aad: &context };
        let sealed = cipher.0.encrypt(&XNonce::from(nonce), payload).unwrap();
        assert_eq!(sealed[..8], [0xbd, 0x6d, 0x17, 0x9d, 0x3e, 0x83, 0xd4, 0x3b]);
        assert_eq!(sealed[sealed.len() - 16..][..4], [0xc0, 0x87, 0x59, 0x24]);
        assert_eq!(cipher.open(&context, &[&nonce[..], &sealed].concat()).unwrap(), plain);
    }
}
