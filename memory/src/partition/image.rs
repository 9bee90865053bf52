//! A partition as an image holds it, and back: slots, words and codes as they were, texts and places from the log.
//! Knows no bytes and no file.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

use super::{Chunk, Partition, Rows};
use crate::format::image::{Image, ImageSlot};
use crate::vectors::Codes;
use crate::words::{Postings, Words};

impl Partition {
    /// The partition that the log holds as `chunks`, with what `image` knows about them. Chunks that the image does not
    /// know are indexed; what it knows and the log does not hold any more is taken out.
    ///
    /// The partition holds no chunk yet.
    pub(crate) fn restore(&mut self, image: Image, chunks: Vec<Chunk>) {
        let dim = self.rows.dim();
        let Image { slots, codes, capacity, postings, .. } = image;
        let lengths: Vec<Option<u32>> =
            slots.iter().map(|slot| slot.as_ref().map(|slot| slot.num_words)).collect();
        let mut by_id = HashMap::with_capacity_and_hasher(slots.len(), RandomState::default());
        let mut gists = Vec::with_capacity(slots.len());
        let mut of_slots = Vec::with_capacity(slots.len());
        for (number, slot) in slots.into_iter().enumerate() {
            let slot = slot.map(|slot| {
                by_id.insert(slot.id, number as u32);
                (slot.gist, slot.rows)
            });
            let (gist, rows) = slot.unwrap_or_default();
            gists.push(gist);
            of_slots.push(rows);
        }
        let num_slots = gists.len();
        self.words = Words::restore(postings, &lengths);
        self.rows = Rows::restore(dim, codes, capacity, of_slots);
        self.gists = gists;
        // As if all of it had come one by one.
        self.num_changes = (by_id.len() + self.rows.index.len()) as u64;
        self.saved = Some(self.num_changes);
        self.slots.resize_with(num_slots, || None);
        self.by_id.reserve(num_slots);
        self.by_gist.reserve(num_slots);
        let mut fresh = Vec::new();
        for chunk in chunks {
            let Some(&slot) = by_id.get(&chunk.id) else {
                fresh.push(chunk);
                continue;
            };
            let num_rows = self.rows.of_slot(slot).len();
            // Vectors that were left in the log are those that the image was made from.
            let fits = if chunk.vectors.is_here() {
                chunk.vectors.len() == num_rows * dim
            } else {
                num_rows > 0
            };
            if !fits {
                self.rows.remove(slot);
                self.rows.insert(slot, &chunk.vectors);
                self.num_changes += 1;
            }
            self.put(slot, chunk);
        }
        let is_used = |slot: &usize| lengths[*slot].is_some();
        let is_gone = |slot: &usize| self.slots[*slot].is_none();
        let gone: HashSet<u32> =
            (0..num_slots).filter(is_used).filter(is_gone).map(|slot| slot as u32).collect();
        if !gone.is_empty() {
            self.words.remove_slots(&gone);
            for &slot in &gone {
                self.rows.remove(slot);
                self.gists[slot as usize] = 0;
            }
        }
        let free = (0..num_slots).rev().filter(|&slot| self.slots[slot].is_none());
        self.free = free.map(|slot| slot as u32).collect();
        self.num_changes += gone.len() as u64;
        self.insert_all(fresh);
    }

    /// What an image of it holds beside the turns: slots, codes with the capacity of rows, words.
    pub(crate) fn image(&self) -> (Vec<Option<ImageSlot>>, (&Codes, usize), &Postings) {
        let slot = |(number, chunk): (usize, &Option<Chunk>)| {
            let (slot, chunk) = (number as u32, chunk.as_ref()?);
            Some(ImageSlot {
                id: chunk.id,
                gist: self.gists[number],
                num_words: self.words.length(slot),
                rows: self.rows.of_slot(slot).into(),
            })
        };
        let index = &self.rows.index;
        let slots = self.slots.iter().enumerate().map(slot).collect();
        (slots, (index.codes(), index.capacity()), self.words.postings())
    }

    /// Vectors and chunks that came or went.
    pub(crate) fn num_changes(&self) -> u64 {
        self.num_changes
    }

    /// Those of them that the last image lacks.
    pub(crate) fn num_unsaved(&self) -> u64 {
        self.num_changes - self.saved.unwrap_or(0).min(self.num_changes)
    }

    /// There is an image of what it was at so many changes; none if there is no image.
    pub(crate) fn set_saved(&mut self, num_changes: Option<u64>) {
        self.saved = num_changes;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Chunk, Place, Vectors};
    use super::*;
    use crate::Role;
    use crate::format::image::ImageTurn;
    use crate::format::vectors::IndexHead;
    use crate::words::Terms;

    const DIM: usize = 8;

    fn chunk(number: u64) -> Chunk {
        let text = format!("Chunk {number} says {} and w{}.", number % 7, number * number % 31);
        let vectors: Vec<f32> =
            (0..DIM * (number as usize % 4)).map(|at| (at as f32 + number as f32).sin()).collect();
        let place = Place {
            session: 1,
            turn: number,
            start: 0,
            end: 9,
            order: number,
            role: Role::User,
            time_ms: 0,
            expires_ms: i64::MAX,
            superseded_ms: i64::MAX,
            near: false,
        };
        let vectors = Vectors::from(vectors);
        let (id, home) = (u128::from(number) + 1, (1, number));
        Chunk { id, text: text.into(), vectors, home, places: vec![place] }
    }

    fn imaged(partition: &Partition) -> Image {
        let head = IndexHead::new(1, "test", DIM as u32, "ada", None);
        let (slots, codes, postings) = partition.image();
        let turn = ImageTurn { body: 1, chunks: 2, spans: Vec::new() };
        let bytes = Image::encode(&head, &[((1, 1), turn)], &slots, codes, postings);
        Image::decode(&bytes, &head).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Some chunks come and go, an image is made, others come and go, and the log holds what is left.
        #[test]
        fn what_an_image_and_the_log_give_is_what_the_log_gives(
            before in prop::collection::vec((0u64..40, any::<bool>()), 0..80),
            after in prop::collection::vec((0u64..40, any::<bool>()), 0..40),
        ) {
            let terms = Terms::new();
            let mut partition = Partition::new(DIM);
            let apply = |partition: &mut Partition, (number, comes): (u64, bool)| {
                let is_there = partition.get(u128::from(number) + 1).is_some();
                if comes && !is_there {
                    partition.insert(&terms, chunk(number));
                } else if !comes {
                    partition.remove(&terms, &[u128::from(number) + 1]);
                }
            };
            before.iter().for_each(|&step| apply(&mut partition, step));
            let image = imaged(&partition);
            prop_assert_eq!(imaged(&partition), image.clone());
            after.iter().for_each(|&step| apply(&mut partition, step));
            let left: Vec<Chunk> = partition.iter().map(|(_, it)| chunk(it.id as u64 - 1)).collect();
            let mut restored = Partition::new(DIM);
            restored.restore(image, left);
            prop_assert_eq!(restored.differing(&partition), 0);
            prop_assert_eq!(partition.differing(&restored), 0);
            // It goes on as the other one does, into slots and rows that are free.
            for step in [(50, true), (51, true), (3, false), (50, false), (52, true)] {
                apply(&mut restored, step);
                apply(&mut partition, step);
            }
            prop_assert_eq!(restored.differing(&partition), 0);
            let left = restored.iter().map(|(_, it)| chunk(it.id as u64 - 1)).collect();
            let mut again = Partition::new(DIM);
            again.restore(imaged(&restored), left);
            prop_assert_eq!(again.differing(&partition), 0);
            prop_assert_eq!(again.num_unsaved(), 0);
        }
    }
}
