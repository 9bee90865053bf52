//! The snapshot and pages of a commit: which pages stay in the window, which are kept outside it, which go.
//! Knows nothing of what a page or a state holds.

use std::collections::{BTreeMap, BTreeSet};

use super::super::Writer;
use super::super::records::Change;
use super::super::state::Session;
use super::Plan;
use crate::format::{Key, Kind, PageRecord, Record, SnapshotRecord};
use crate::{Error, NewPage, NewSnapshot, Result};

impl Plan<'_> {
    pub(super) fn snapshot(
        &mut self,
        writer: &mut Writer,
        known: Option<&Session>,
        new: &NewSnapshot,
        evicted_page_bytes: u64,
    ) -> Result<()> {
        let old = known.and_then(|session| session.snapshot);
        // Pages of another model are never mixed with this one's.
        let same = old.is_some_and(|old| old.fingerprint == new.fingerprint);
        let stored: BTreeMap<u64, PageRecord> =
            known.filter(|_| same).map(|session| session.pages.clone()).unwrap_or_default();
        let given: BTreeMap<u64, &NewPage> =
            new.pages.iter().map(|(page, bytes)| (*page, bytes)).collect();
        let window: BTreeSet<u64> = new.window.iter().copied().collect();
        if let Some(page) =
            window.iter().find(|page| !given.contains_key(page) && !stored.contains_key(page))
        {
            return Err(Error::invalid(format!(
                "commit: expected page {page} of the window among the pages given or stored"
            )));
        }
        let evicted = evict(&stored, &given, &window, new.first_page, evicted_page_bytes);
        let all: BTreeSet<u64> = stored.keys().chain(given.keys()).copied().collect();
        for page in all {
            let place = if window.contains(&page) { Some(0) } else { evicted.get(&page).copied() };
            let key = Key::Page(self.session, page);
            match (place, given.get(&page), stored.get(&page)) {
                (Some(evicted), Some(bytes), _) => {
                    let blob = writer.appender.append_parts(Kind::Page, &bytes.parts())?;
                    self.put(key, Record::Page(PageRecord { blob, evicted }));
                }
                (Some(evicted), None, Some(record)) if record.evicted != evicted => {
                    self.put(key, Record::Page(PageRecord { evicted, ..*record }));
                }
                (None, _, Some(_)) => self.changes.push(Change::remove(key)),
                _ => {}
            }
        }
        for page in known.filter(|_| !same).iter().flat_map(|session| session.pages.keys()) {
            // A page that was given anew is replaced by the change listed above.
            if !given.contains_key(page) || !(window.contains(page) || evicted.contains_key(page)) {
                self.changes.push(Change::remove(Key::Page(self.session, *page)));
            }
        }
        let state = writer.appender.append(Kind::State, &new.state)?;
        let record = SnapshotRecord {
            fingerprint: new.fingerprint,
            position: new.position,
            num_window_pages: window.len() as u64,
            state,
        };
        self.put(Key::Snapshot(self.session), Record::Snapshot(record));
        Ok(())
    }
}

/// Places in the order of eviction for the pages from `first_page` on outside the window that fit the budget, newest kept first.
fn evict(
    stored: &BTreeMap<u64, PageRecord>,
    given: &BTreeMap<u64, &NewPage>,
    window: &BTreeSet<u64>,
    first_page: u64,
    budget_bytes: u64,
) -> BTreeMap<u64, u64> {
    let mut next = stored.values().map(|record| record.evicted).max().unwrap_or(0) + 1;
    let mut outside: Vec<(u64, u64, u64)> = Vec::new();
    let pages: BTreeSet<u64> = stored.keys().chain(given.keys()).copied().collect();
    let is_kept = |page: &u64| *page >= first_page && !window.contains(page);
    for page in pages.into_iter().filter(is_kept) {
        let record = stored.get(&page);
        let stored_bytes = record.map_or(0, |record| u64::from(record.blob.len));
        let bytes = given.get(&page).map_or(stored_bytes, |bytes| bytes.num_bytes() as u64);
        let evicted = match record {
            Some(record) if record.evicted > 0 => record.evicted,
            _ => {
                next += 1;
                next - 1
            }
        };
        outside.push((evicted, page, bytes));
    }
    outside.sort_unstable_by(|a, b| b.cmp(a));
    let mut left = budget_bytes;
    let mut kept = BTreeMap::new();
    for (evicted, page, bytes) in outside {
        if bytes > left {
            break;
        }
        left -= bytes;
        kept.insert(page, evicted);
    }
    // A budget of zero keeps nothing, not even pages without bytes.
    if budget_bytes == 0 { BTreeMap::new() } else { kept }
}

pub(super) fn check_pages(snapshot: &NewSnapshot) -> Result<()> {
    let mut seen = BTreeSet::new();
    match snapshot.pages.iter().find(|(page, _)| !seen.insert(*page)) {
        None => Ok(()),
        Some((page, _)) => Err(Error::invalid(format!("commit: page {page} is given twice"))),
    }
}
