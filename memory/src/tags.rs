//! The turns of one partition by their metadata: an expression becomes a set of turns before anything is searched.
//! Knows a turn by two numbers and a chunk by its slot.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use crate::filter::{Filter, Metadata, Value};
use crate::vectors::Bits;

/// Session and turn.
type TurnKey = (u64, u64);

#[derive(Debug, Default)]
struct Tagged {
    metadata: Metadata,
    /// Slots of the chunks that stand in the turn.
    slots: Vec<u32>,
}

/// Turns, numbered from 0, and for each key and value the numbers of the turns that have it.
#[derive(Debug, Default)]
pub(crate) struct Tags {
    numbers: HashMap<TurnKey, u32>,
    turns: Vec<Tagged>,
    free: Vec<u32>,
    /// Numbers in use.
    used: Bits,
    keys: HashMap<String, BTreeMap<Value, BTreeSet<u32>>>,
}

impl Tags {
    /// A chunk stands in a turn.
    pub(crate) fn add(&mut self, turn: TurnKey, slot: u32) {
        let number = self.number(turn);
        self.turns[number as usize].slots.push(slot);
    }

    /// A turn's metadata. Set once: a turn never changes.
    pub(crate) fn set(&mut self, turn: TurnKey, metadata: &Metadata) {
        if metadata.is_empty() {
            return;
        }
        let number = self.number(turn);
        for (key, value) in metadata {
            let values = self.keys.entry(key.clone()).or_default();
            values.entry(value.clone()).or_default().insert(number);
        }
        self.turns[number as usize].metadata = metadata.clone();
    }

    /// A turn is no longer recalled.
    pub(crate) fn remove(&mut self, turn: TurnKey) {
        let Some(number) = self.numbers.remove(&turn) else { return };
        let tagged = std::mem::take(&mut self.turns[number as usize]);
        for (key, value) in &tagged.metadata {
            let Some(values) = self.keys.get_mut(key) else { continue };
            if let Some(numbers) = values.get_mut(value) {
                numbers.remove(&number);
                if numbers.is_empty() {
                    values.remove(value);
                }
            }
            if values.is_empty() {
                self.keys.remove(key);
            }
        }
        self.used.remove(number as usize);
        self.free.push(number);
    }

    /// A turn's metadata; none if it has none.
    pub(crate) fn metadata(&self, turn: TurnKey) -> Option<&Metadata> {
        let &number = self.numbers.get(&turn)?;
        Some(&self.turns[number as usize].metadata).filter(|metadata| !metadata.is_empty())
    }

    /// The turns that a filter accepts.
    pub(crate) fn accepted(&self, filter: &Filter) -> Accepted<'_> {
        Accepted { tags: self, numbers: self.evaluate(filter) }
    }

    fn number(&mut self, turn: TurnKey) -> u32 {
        if let Some(&number) = self.numbers.get(&turn) {
            return number;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.turns.push(Tagged::default());
            self.turns.len() as u32 - 1
        });
        self.numbers.insert(turn, number);
        self.used.grow(number as usize + 1);
        self.used.insert(number as usize);
        number
    }

    fn gather<'a>(&self, sets: impl Iterator<Item = &'a BTreeSet<u32>>) -> Bits {
        let mut bits = Bits::none(self.used.len());
        sets.flatten().for_each(|&number| bits.insert(number as usize));
        bits
    }

    fn evaluate(&self, filter: &Filter) -> Bits {
        let none = || Bits::none(self.used.len());
        match filter {
            Filter::And(parts) => parts.iter().fold(self.used.clone(), |mut bits, part| {
                bits.and(&self.evaluate(part));
                bits
            }),
            Filter::Or(parts) => parts.iter().fold(none(), |mut bits, part| {
                bits.or(&self.evaluate(part));
                bits
            }),
            Filter::Not(part) => {
                let mut bits = self.evaluate(part);
                bits.not();
                bits.and(&self.used);
                bits
            }
            Filter::Has(key) => {
                self.gather(self.keys.get(key).into_iter().flat_map(BTreeMap::values))
            }
            Filter::In(key, values) => {
                let known = self.keys.get(key);
                self.gather(values.iter().filter_map(|value| known?.get(value)))
            }
            Filter::Range(key, from, to) => {
                let Some(known) = self.keys.get(key) else { return none() };
                if from.as_ref().zip(to.as_ref()).is_some_and(|(from, to)| from > to) {
                    return none();
                }
                let bound =
                    |value: &Option<Value>| value.clone().map_or(Bound::Unbounded, Bound::Included);
                // Bounds of one kind alone: an open side reaches into other kinds, which the filter itself leaves out.
                let within = known.range((bound(from), bound(to)));
                let same_kind = within.filter(|(value, _)| {
                    let alone = Metadata::from([(key.clone(), (*value).clone())]);
                    filter.accepts(&alone)
                });
                self.gather(same_kind.map(|(_, numbers)| numbers))
            }
        }
    }
}

/// The turns that a filter accepts.
pub(crate) struct Accepted<'a> {
    tags: &'a Tags,
    numbers: Bits,
}

impl Accepted<'_> {
    pub(crate) fn contains(&self, session: u64, turn: u64) -> bool {
        self.tags
            .numbers
            .get(&(session, turn))
            .is_some_and(|&number| self.numbers.contains(number as usize))
    }

    /// Slots of the chunks that stand in these turns, some more than once.
    pub(crate) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.numbers.iter().flat_map(|number| self.tags.turns[number].slots.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::from),
            (-2i32..3).prop_map(Value::from),
            prop::sample::select(vec!["", "a", "b"]).prop_map(Value::from),
        ]
    }

    fn key() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["x", "y"]).prop_map(str::to_owned)
    }

    fn filter() -> impl Strategy<Value = Filter> {
        let leaf = prop_oneof![
            key().prop_map(Filter::Has),
            (key(), prop::collection::vec(value(), 0..3)).prop_map(|(k, v)| Filter::In(k, v)),
            (key(), prop::option::of(value()), prop::option::of(value()))
                .prop_map(|(key, from, to)| Filter::Range(key, from, to)),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::And),
                prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::Or),
                inner.prop_map(Filter::not),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_index_accepts_what_the_filter_accepts(
            turns in prop::collection::vec(prop::collection::btree_map(key(), value(), 0..3), 0..20),
            gone in prop::collection::btree_set(0usize..20, 0..6),
            filter in filter(),
        ) {
            let mut tags = Tags::default();
            for (number, metadata) in turns.iter().enumerate() {
                tags.add((1, number as u64), number as u32);
                tags.set((1, number as u64), metadata);
            }
            gone.iter().for_each(|&number| tags.remove((1, number as u64)));
            // A number that is given again must not keep what it meant.
            tags.add((2, 7), 99);
            let accepted = tags.accepted(&filter);
            let mut expected: Vec<u32> = turns
                .iter()
                .enumerate()
                .filter(|(number, metadata)| !gone.contains(number) && filter.accepts(metadata))
                .map(|(number, _)| number as u32)
                .collect();
            for number in 0..turns.len() {
                let is_expected = expected.contains(&(number as u32));
                prop_assert_eq!(accepted.contains(1, number as u64), is_expected);
            }
            if filter.accepts(&Metadata::new()) {
                expected.push(99);
            }
            let mut slots: Vec<u32> = accepted.slots().collect();
            slots.sort_unstable();
            prop_assert_eq!(slots, expected);
        }
    }
}
