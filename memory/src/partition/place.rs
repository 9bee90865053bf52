//! Where and when a text was said, until when it counts, and what came to stand in its place.
//! Knows nothing of texts, indexes or files.

use crate::Role;

/// One place where a chunk's text was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) session: u64,
    pub(crate) turn: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) order: u64,
    pub(crate) role: Role,
    pub(crate) time_ms: i64,
    /// When it stops being recalled; `i64::MAX` for never.
    pub(crate) expires_ms: i64,
    /// Time of the turn that superseded it, the first one if there are several; `i64::MAX` if none did.
    pub(crate) superseded_ms: i64,
    /// The place holds nearly the chunk's text, not the same.
    pub(crate) near: bool,
}

/// The moment that a recall looks at memory from.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moment {
    /// Memory as it was at this time; as it is, if none.
    pub(crate) as_of_ms: Option<i64>,
    /// The caller's clock.
    pub(crate) now_ms: Option<i64>,
}

impl Place {
    /// Whether there is a time after which it is not recalled.
    pub(super) fn expires(&self) -> bool {
        self.expires_ms < i64::MAX
    }

    /// Whether the place existed and had not expired.
    pub(crate) fn exists(&self, moment: Moment) -> bool {
        moment.as_of_ms.is_none_or(|as_of| self.time_ms <= as_of)
            && (!self.expires()
                || moment.as_of_ms.or(moment.now_ms).is_none_or(|at| at < self.expires_ms))
    }

    /// Whether a newer turn of the same subject had taken its place.
    pub(crate) fn is_stale(&self, moment: Moment) -> bool {
        self.superseded_ms <= moment.as_of_ms.unwrap_or(i64::MAX).min(i64::MAX - 1)
    }
}

/// A turn that says something about a subject.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) time_ms: i64,
    pub(crate) order: u64,
    /// Session and turn.
    pub(crate) turn: (u64, u64),
    /// The turn's chunks.
    pub(crate) chunks: Vec<u128>,
}

impl Version {
    /// Whether both are one statement, which a fork has as its original does.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.time_ms, self.order) == (other.time_ms, other.order)
    }
}

/// The versions that a newer one superseded, of those of one subject, oldest first.
pub(super) fn superseded(versions: &[Version]) -> impl Iterator<Item = &Version> {
    let newest = versions.last();
    versions.iter().filter(move |version| newest.is_some_and(|newest| !version.is_same(newest)))
}

/// Chunks of those.
pub(super) fn num_superseded(versions: &[Version]) -> usize {
    superseded(versions).map(|version| version.chunks.len()).sum()
}
