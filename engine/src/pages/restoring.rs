//! What an opening finds of stored pages on the disk: their landmarks, or the pages where there are none.
//! Knows no file; pages that are wanted later are read then.

use super::index::{HeadIndex, SPAN};
use super::landmarks::{Landmarks, OutlierAt};
use super::reading::PageSource;
use super::store::{PageStore, Stored};
use mka_kernels::{PAGE_TOKENS, rows};
use mka_memory::PageBytes;
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// Pages whose landmarks are read side by side: 23 MB of the default model's.
const READ_PAGES: usize = 256;

impl PageStore {
    /// Fills an empty store from the disk with pages `stored` (ascending) below `end`, where the window begins; `noted`
    /// are the ids of the window's tokens.
    ///
    /// Landmarks are read, and pages only where they have none; the others are read once they are wanted.
    pub(crate) fn restore(&mut self, stored: &[u64], end: u64, noted: &[u32]) {
        self.note_tokens(end * PAGE_TOKENS as u64, noted);
        self.next.fill(end.max(self.shape.sink_pages));
        let Some(source) = self.source.clone() else { return };
        let (mut known, mut remade) = (HashMap::new(), 0);
        let is_outside = |page: &u64| (self.shape.sink_pages..end).contains(page);
        let pages: Vec<u64> = stored.iter().copied().filter(is_outside).collect();
        if self.bytes_with(0, pages.len()) <= self.config.bytes {
            let (d, asked) = (self.shape.head_dim, self.asked_of_rows());
            // The system gives memory as it is written; without some for what comes, the first page after an opening would
            // copy every head's index while a question waits, hundreds of megabytes of a long session.
            let room = pages.len() + pages.len() / 8 + 16;
            self.index.iter_mut().flatten().for_each(|head| head.reserve(room, d, asked));
        }
        'pages: for pages in pages.chunks(READ_PAGES) {
            let landmarks: Vec<_> =
                pages.par_iter().map(|page| read_landmarks(&*source, *page)).collect();
            let shape = self.landmark_shape();
            let read = landmarks.iter().map(|it| Landmarks::read(it.as_deref()?, &shape));
            let read: Vec<Option<Landmarks<'_>>> = read.collect();
            if let Some(all) = self.whole(&read) {
                self.take_in_together(pages, &all, &mut known);
                continue;
            }
            for (page, read) in pages.iter().zip(read) {
                let has_room = match read {
                    Some(landmarks) => self.take_in(*page, &landmarks, &mut known),
                    None => {
                        remade += 1;
                        self.remake(*page)
                    }
                };
                if !has_room {
                    break 'pages;
                }
            }
        }
        self.keep_index_share(0);
        if self.following.is_some() && remade > 0 {
            tracing::warn!(
                pages = remade,
                "stored without InfLLM's representatives: all keys of a block stand for it"
            );
        }
        self.name_restored(&known);
        self.fill_mirror();
    }

    /// The landmarks of a run of pages if each has some and there is room for all of them.
    fn whole<'a, 'b>(&self, read: &'a [Option<Landmarks<'b>>]) -> Option<Vec<&'a Landmarks<'b>>> {
        let has_room = self.bytes_with(0, read.len()) <= self.config.bytes;
        read.iter().map(Option::as_ref).collect::<Option<_>>().filter(|_| has_room)
    }

    /// Takes in a page by its landmarks; false where there is no room. Outliers are added to `known`.
    fn take_in(
        &mut self,
        page: u64,
        landmarks: &Landmarks<'_>,
        known: &mut HashMap<OutlierAt, Box<[u8]>>,
    ) -> bool {
        if !self.make_room(0, 1, &[], true) {
            return false;
        }
        self.take_in_together(&[page], &[landmarks], known);
        true
    }

    /// Takes in pages that there is room for by their landmarks, heads side by side.
    fn take_in_together(
        &mut self,
        pages: &[u64],
        landmarks: &[&Landmarks<'_>],
        known: &mut HashMap<OutlierAt, Box<[u8]>>,
    ) {
        for (page, landmarks) in pages.iter().zip(landmarks) {
            let (tokens, used) = (landmarks.tokens.clone(), self.tick());
            let (durable, given, marked) = (true, true, true);
            self.pages.insert(*page, Stored { bytes: None, tokens, durable, given, marked, used });
            self.order.push(*page);
            if let Some(following) = &mut self.following {
                following.restore(*page, &landmarks.representatives());
            }
            landmarks.outliers(known);
        }
        let (d, asked) = (self.shape.head_dim, self.asked_of_rows());
        let heads: Vec<_> = self.index.iter_mut().flatten().enumerate().collect();
        heads.into_par_iter().for_each(|(at, head)| {
            landmarks.iter().for_each(|landmarks| head.push_row(landmarks.row(at), d, asked));
        });
    }

    /// Whether rows have means, and whether codes are taken in with them.
    fn asked_of_rows(&self) -> (bool, bool) {
        (self.config.estimate, self.rotation.is_some())
    }

    /// Takes in a page whose landmarks are to be made from it; false where there is no room. A page that cannot be read is
    /// passed over.
    fn remake(&mut self, page: u64) -> bool {
        let Some((bytes, tokens)) = self.read_page(page) else { return true };
        if !self.make_room(self.page_bytes(), 1, &[], true) {
            return false;
        }
        self.resident_bytes += bytes.len() as u64;
        let used = self.tick();
        let bytes = Some(Arc::new(PageBytes::from(bytes)));
        let (durable, given, marked) = (true, true, false);
        self.pages.insert(page, Stored { bytes, tokens, durable, given, marked, used });
        self.order.push(page);
        (0..self.shape.num_layers).for_each(|layer| self.index_page(layer, page));
        true
    }

    /// Names the outliers as they were named last, with their keys from `known` or else from their pages.
    fn name_restored(&mut self, known: &HashMap<OutlierAt, Box<[u8]>>) {
        let (d, pages) = (self.shape.head_dim, self.named_rows());
        let mut index = std::mem::take(&mut self.index);
        let name = |(layer, heads): (usize, &mut Vec<_>)| -> Vec<Vec<u32>> {
            let heads = heads.iter_mut().enumerate();
            let name = |(head, own): (usize, &mut HeadIndex)| {
                let keys_of = |mark: usize| {
                    let keys = known.get(&(layer, head, self.place(mark as u32)))?;
                    let mut out = vec![0f32; SPAN * d];
                    rows::widen_bf16(keys, &mut out);
                    Some(out)
                };
                let named = own.least_agreeing(pages);
                own.name_outliers(&named, d, keys_of);
                own.set_saved(|_| true);
                named
            };
            heads.map(name).collect()
        };
        let named: Vec<_> = index.par_iter_mut().enumerate().map(name).collect();
        self.index = index;
        // Those that no record had.
        for (layer, named) in named.iter().enumerate() {
            self.set_outliers(layer, named);
        }
    }
}

/// A page's landmarks as the disk has them; None, with a warning where they are damaged, if they must be made anew.
fn read_landmarks(source: &dyn PageSource, page: u64) -> Option<Vec<u8>> {
    source.landmarks(page).unwrap_or_else(|error| {
        tracing::warn!(page, %error, "landmarks of a stored page are made anew");
        None
    })
}
