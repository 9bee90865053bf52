//! Which row of the vector index is which vector of which chunk's slot, both ways.
//! Knows a chunk by its slot, and keeps no vector.

use crate::vectors::{Codes, Index};

/// The index of a partition's vectors, with names for its rows.
#[derive(Debug)]
pub(super) struct Rows {
    dim: usize,
    pub(super) index: Index,
    /// The row of each vector of a slot.
    of_slots: Vec<Box<[u32]>>,
    /// The slot of each row, and which of the slot's vectors it is.
    owners: Vec<(u32, u32)>,
}

impl Rows {
    /// No rows yet; vectors have `dim` numbers.
    pub(super) fn new(dim: usize) -> Self {
        Self { dim, index: Index::new(dim), of_slots: Vec::new(), owners: Vec::new() }
    }

    /// The rows of each slot as [`of_slot`](Self::of_slot) gave them, with the codes of the index. The rows are below
    /// `capacity`, and no two are the same.
    pub(super) fn restore(
        dim: usize,
        codes: Codes,
        capacity: usize,
        of_slots: Vec<Box<[u32]>>,
    ) -> Self {
        let mut owners = vec![(0, 0); capacity];
        for (slot, rows) in of_slots.iter().enumerate() {
            for (at, &row) in rows.iter().enumerate() {
                owners[row as usize] = (slot as u32, at as u32);
            }
        }
        let live = of_slots.iter().flat_map(|rows| rows.iter().copied());
        Self { dim, index: Index::restore(dim, codes, capacity, live), of_slots, owners }
    }

    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// Gives the vectors `(n, dim)` of a slot, which has none yet, their rows.
    pub(super) fn insert(&mut self, slot: u32, vectors: &[f32]) {
        let mut rows = Vec::with_capacity(vectors.len() / self.dim);
        for (at, vector) in vectors.chunks_exact(self.dim).enumerate() {
            let row = self.index.insert(vector);
            if self.owners.len() <= row as usize {
                self.owners.resize(row as usize + 1, (0, 0));
            }
            self.owners[row as usize] = (slot, at as u32);
            rows.push(row);
        }
        if self.of_slots.len() <= slot as usize {
            self.of_slots.resize(slot as usize + 1, Box::default());
        }
        self.of_slots[slot as usize] = rows.into();
    }

    /// Takes the rows of a slot out.
    pub(super) fn remove(&mut self, slot: u32) {
        let rows = self.of_slots.get_mut(slot as usize).map(std::mem::take);
        rows.iter().flatten().for_each(|&row| self.index.remove(row));
    }

    /// The row of each vector of a slot.
    pub(super) fn of_slot(&self, slot: u32) -> &[u32] {
        self.of_slots.get(slot as usize).map_or(&[], |rows| rows)
    }

    /// The slot of a row and which of its vectors stands there; none if the row was taken out.
    pub(super) fn owner(&self, row: u32) -> Option<(u32, u32)> {
        let owner = *self.owners.get(row as usize)?;
        (self.of_slot(owner.0).get(owner.1 as usize) == Some(&row)).then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_given_again_belongs_to_its_new_owner_alone() {
        let mut rows = Rows::new(2);
        rows.insert(0, &[1.0, 0.0, 0.0, 1.0]);
        rows.insert(3, &[0.6, 0.8]);
        assert_eq!(
            (rows.owner(1), rows.owner(2), rows.owner(9)),
            (Some((0, 1)), Some((3, 0)), None)
        );
        rows.remove(0);
        assert_eq!((rows.owner(0), rows.owner(1), rows.of_slot(0)), (None, None, &[][..]));
        rows.insert(1, &[0.0, 1.0]);
        let row = rows.of_slot(1)[0];
        assert!(row < 2 && rows.owner(row) == Some((1, 0)) && rows.owner(1 - row).is_none());
        rows.remove(7);
        assert_eq!(rows.index.len(), 2);
        let (index, of_slots) = (&rows.index, rows.of_slots.clone());
        let again = Rows::restore(2, index.codes().clone(), index.capacity(), of_slots);
        assert_eq!((again.owners.len(), &again.of_slots), (3, &rows.of_slots));
        let (mut again, mut rows) = (again, rows);
        again.insert(5, &[1.0, 0.0]);
        rows.insert(5, &[1.0, 0.0]);
        assert_eq!((again.of_slot(5), again.owner(row)), (rows.of_slot(5), rows.owner(row)));
        assert_eq!(again.index.codes(), rows.index.codes());
    }
}
