//! A set of small numbers as bits: which rows live, which a filter keeps.
//! Knows nothing of what the numbers mean.

/// A set of numbers below `len`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    /// No number below `len`.
    pub(crate) fn none(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len }
    }

    /// Every number below `len`.
    #[cfg(test)]
    pub(crate) fn all(len: usize) -> Self {
        let mut bits = Self { words: vec![u64::MAX; len.div_ceil(64)], len };
        bits.trim();
        bits
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Makes room for numbers below `len`; new ones are not in the set.
    pub(crate) fn grow(&mut self, len: usize) {
        if len > self.len {
            self.words.resize(len.div_ceil(64), 0);
            self.len = len;
        }
    }

    pub(crate) fn contains(&self, at: usize) -> bool {
        self.words.get(at / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// # Panics
    /// If `at` is not below the length.
    pub(crate) fn insert(&mut self, at: usize) {
        self.words[at / 64] |= 1 << (at % 64);
    }

    pub(crate) fn remove(&mut self, at: usize) {
        if let Some(word) = self.words.get_mut(at / 64) {
            *word &= !(1 << (at % 64));
        }
    }

    /// The set, 64 numbers to a word.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Puts in `first` and those of the 63 numbers after it that `word` says.
    ///
    /// # Panics
    /// If one of them is not below the length.
    pub(crate) fn insert_word(&mut self, first: usize, word: u64) {
        let (at, shift) = (first / 64, first % 64);
        self.words[at] |= word << shift;
        let rest = if shift == 0 { 0 } else { word >> (64 - shift) };
        if rest != 0 {
            self.words[at + 1] |= rest;
        }
    }

    /// How many stretches of 32 numbers, from 0 on, have one in the set.
    pub(crate) fn num_blocks(&self) -> usize {
        let halves = |word: &u64| usize::from(*word as u32 != 0) + usize::from(word >> 32 != 0);
        self.words.iter().map(halves).sum()
    }

    /// The 32 numbers from `32 * block` on; zeros beyond the end.
    pub(crate) fn block(&self, block: usize) -> u32 {
        let word = self.words.get(block / 2).copied().unwrap_or(0);
        (word >> (32 * (block % 2))) as u32
    }

    pub(crate) fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub(crate) fn and(&mut self, other: &Self) {
        for (at, word) in self.words.iter_mut().enumerate() {
            *word &= other.words.get(at).copied().unwrap_or(0);
        }
    }

    pub(crate) fn or(&mut self, other: &Self) {
        self.grow(other.len);
        self.words.iter_mut().zip(&other.words).for_each(|(word, more)| *word |= more);
    }

    pub(crate) fn not(&mut self) {
        self.words.iter_mut().for_each(|word| *word = !*word);
        self.trim();
    }

    /// The numbers of the set, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            std::iter::successors((word != 0).then_some(word), |word| {
                let rest = word & (word - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |word| at * 64 + word.trailing_zeros() as usize)
        })
    }

    /// The numbers of the set, ascending.
    pub(crate) fn to_vec(&self) -> Vec<u32> {
        let mut numbers = Vec::with_capacity(self.count());
        for (at, &word) in self.words.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                numbers.push(at as u32 * 64 + left.trailing_zeros());
                left &= left - 1;
            }
        }
        numbers
    }

    fn trim(&mut self) {
        if !self.len.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.len % 64)) - 1;
        }
    }
}

impl FromIterator<usize> for Bits {
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        let mut bits = Self::default();
        for number in numbers {
            bits.grow(number + 1);
            bits.insert(number);
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_are_a_set(len in 1usize..200, a in prop::collection::btree_set(0usize..200, 0..40), b in prop::collection::btree_set(0usize..200, 0..40)) {
            let fill = |numbers: &BTreeSet<usize>| {
                let mut bits = Bits::none(len);
                numbers.iter().filter(|&&at| at < len).for_each(|&at| bits.insert(at));
                bits
            };
            let model = |numbers: BTreeSet<usize>| numbers.into_iter().filter(|&at| at < len).collect::<Vec<_>>();
            let (x, y) = (fill(&a), fill(&b));
            let mut both = x.clone();
            both.and(&y);
            prop_assert_eq!(both.iter().collect::<Vec<_>>(), model(&a & &b));
            let mut either = x.clone();
            either.or(&y);
            prop_assert_eq!(either.iter().collect::<Vec<_>>(), model(&a | &b));
            let mut others = x.clone();
            others.not();
            prop_assert_eq!(others.iter().collect::<Vec<_>>(), model(&(0..len).collect() - &a));
            prop_assert_eq!(others.count() + x.count(), len);
            prop_assert_eq!(Bits::all(len).count(), len);
            for block in 0..8 {
                for bit in 0..32 {
                    prop_assert_eq!(x.block(block) >> bit & 1 == 1, x.contains(block * 32 + bit));
                }
            }
        }
    }
}
