//! What a session keeps beside its pages: the bytes of [`SessionState`] and of the streaming summary.
//! Knows no page and no file.

use crate::error::{Error, ErrorKind, Result};
use mka_memory::TurnId;
use serde::{Deserialize, Serialize};

/// Where the stream stands in the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) enum OpenTurn {
    /// Nothing was said.
    #[default]
    Start,
    /// A user message is open: a document was fed, and the question continues it.
    User,
    /// Results of tools broke off behind sections of theirs; nothing has closed them.
    Results,
    /// An answer ended, by this token if the model chose one, or was taken back to its first word; its closing scaffold is
    /// not in the stream yet.
    Answered { closed_by: Option<u32> },
}

/// The small part of a session's state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct SessionState {
    pub(crate) open: OpenTurn,
    /// Turns that lie in the window as a whole, and where each begins in the stream, ascending.
    pub(crate) turn_starts: Vec<(TurnId, u64)>,
    /// The newest tokens of the stream, for the repetition penalty.
    pub(crate) recent_tokens: Vec<u32>,
    /// Counts the streams that this session had: pages of a stream that was begun anew are not this one's.
    #[serde(default)]
    pub(crate) stream: u32,
    /// Ids of the tokens in the window, from its first whole page on; empty where no pages are kept.
    #[serde(default)]
    pub(crate) window_ids: Vec<u32>,
    /// Pages at the start of the stream that every token sees; 0 of a state from before there could be more than one.
    #[serde(default)]
    pub(crate) sink_pages: u32,
}

/// Version of the bytes below.
const VERSION: u8 = 1;

impl SessionState {
    /// Pages at the start of the stream that every token sees.
    pub(crate) fn sinks(&self) -> u64 {
        u64::from(self.sink_pages.max(1))
    }

    /// version, length of the JSON as u32 little-endian, JSON, then `ema` to the end.
    pub(crate) fn to_bytes(&self, ema: &[u8]) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self)
            .map_err(|e| Error::model(format!("snapshot: {e}")).with_source(e))?;
        let len = u32::try_from(json.len())
            .map_err(|e| Error::model("snapshot: state above 4 GiB").with_source(e))?;
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&json);
        bytes.extend_from_slice(ema);
        Ok(bytes)
    }

    /// Reads what [`SessionState::to_bytes`] wrote: the state and the summary's bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let damaged =
            |what: &str| Error::new(ErrorKind::Corrupted, format!("restore: session state {what}"));
        let (version, rest) = bytes.split_first().ok_or_else(|| damaged("is empty"))?;
        if *version != VERSION {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!("restore: session state version {version}, expected {VERSION}"),
            ));
        }
        let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("is cut"))?;
        let len = u32::from_le_bytes(*len) as usize;
        let (json, ema) = rest.split_at_checked(len).ok_or_else(|| damaged("is cut"))?;
        let state = serde_json::from_slice(json)
            .map_err(|e| damaged(&format!("is damaged: {e}")).with_source(e))?;
        Ok((state, ema))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn state_survives_its_bytes() {
        let state = SessionState {
            open: OpenTurn::Answered { closed_by: Some(2) },
            turn_starts: vec![(3, 64), (4, 200)],
            recent_tokens: vec![1, 2, 3],
            stream: 1,
            window_ids: vec![7, u32::MAX],
            sink_pages: 3,
        };
        let bytes = state.to_bytes(&[9, 8, 7]).unwrap();
        assert_eq!(SessionState::from_bytes(&bytes).unwrap(), (state, &[9u8, 8, 7][..]));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_state_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = SessionState::from_bytes(&bytes);
        }
    }
}
