//! Where and when a text was said, until when it counts, and when something else came to stand in its place.
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

/// Says in the places of one turn that another took its place at `superseded_ms`; they ascend by order and session.
pub(super) fn supersede(
    places: &mut [Place],
    order: u64,
    (session, turn): (u64, u64),
    superseded_ms: i64,
) {
    let key = (order, session);
    // Many turns may have said the very same.
    let first = places.partition_point(|place| (place.order, place.session) < key);
    let own = places[first..].iter_mut();
    own.take_while(|place| (place.order, place.session) == key)
        .filter(|place| place.turn == turn)
        .for_each(|place| place.superseded_ms = superseded_ms);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_of_one_turn_are_superseded_and_no_others() {
        let place = |session, turn, start, order| Place {
            session,
            turn,
            start,
            end: start + 2,
            order,
            role: Role::User,
            time_ms: 0,
            expires_ms: i64::MAX,
            superseded_ms: i64::MAX,
            near: false,
        };
        let mut places = [
            place(1, 0, 0, 3),
            place(1, 1, 0, 5),
            place(1, 1, 9, 5),
            place(2, 1, 0, 5),
            place(1, 2, 0, 6),
        ];
        supersede(&mut places, 5, (1, 1), 20);
        supersede(&mut places, 6, (3, 2), 30);
        supersede(&mut places, 4, (1, 1), 30);
        let never = i64::MAX;
        assert_eq!(places.map(|place| place.superseded_ms), [never, 20, 20, never, never]);
    }
}
