//! Scans against each other: what one takes, the others take or may leave.

use super::*;

const D: usize = 16;
const SCANS: [LandmarkScan; 2] = [LandmarkScan::TwoLevel, LandmarkScan::SignHash];

fn number(i: usize) -> f32 {
    ((i * 2_654_435_761) % 10_007) as f32 / 2500.0 - 2.0
}

/// Two heads of `pages` pages; in each page keys are alike but for a part of `apart`.
fn index(pages: usize, apart: f32) -> Vec<HeadIndex> {
    let head = |head: usize| {
        let key = |page: usize, token: usize| {
            let own = move |i| apart * number((head * pages + page) * 9000 + token * D + i);
            (0..D).map(move |i| number((head * pages + page) * 31 + i) + own(i))
        };
        let page = |page: usize| -> Vec<f32> {
            (0..PAGE_TOKENS).flat_map(|token| key(page, token)).collect()
        };
        let mut index = HeadIndex::default();
        let rotation = Rotation::new(D);
        (0..pages).for_each(|i| {
            index.push(&page(i), D);
            index.push_codes(&page(i), &rotation);
        });
        let keys =
            |mark: usize| Some(page(mark / MARKS)[mark % MARKS * SPAN * D..][..SPAN * D].to_vec());
        index.name_outliers(&index.least_agreeing(pages), D, keys);
        index
    };
    vec![head(0), head(1)]
}

fn queries(count: usize) -> Queries {
    let group = 2;
    let of = |head: usize| (0..count * group * D).map(|i| number(i * 7 + head) * 0.4).collect();
    Queries { heads: vec![of(0), of(1)], count, group, d: D }
}

fn taken(
    heads: &mut [HeadIndex],
    queries: &Queries,
    scan: LandmarkScan,
    (pages, wanted, pinned): (usize, usize, &[u32]),
) -> Vec<Taken> {
    let (planes, rotation) = (Planes::new(D), Rotation::new(D));
    heads.iter_mut().for_each(|head| head.prepare(scan, &planes, D));
    let rotation = Some(&rotation);
    let scanned = Scan::plain(heads, (pages, wanted), &planes, rotation);
    Scan { named: Named { pinned, ..scanned.named }, ..scanned }.take(
        scan,
        queries,
        &mut Ballot::default(),
    )
}

#[test]
fn a_scan_that_leaves_every_landmark_takes_what_the_flat_one_takes() {
    let mut heads = index(70, 0.7);
    assert!(!heads[0].all_outliers().is_empty());
    for (scan, left) in
        [(LandmarkScan::TwoLevel, LEFT_BY_MEANS), (LandmarkScan::SignHash, LEFT_BY_CODES)]
    {
        for count in [1, 3] {
            let queries = queries(count);
            let asked = (70, 70 * MARKS / left, &[3u32, 200][..]);
            let flat = taken(&mut heads, &queries, LandmarkScan::Flat, asked);
            for (own, flat) in taken(&mut heads, &queries, scan, asked).iter().zip(&flat) {
                assert_eq!(own.marks, flat.marks);
                assert!(own.marks.contains(&(3, f32::INFINITY)));
                match scan {
                    LandmarkScan::TwoLevel => assert_eq!(own.missed, flat.missed),
                    _ => assert!(own.missed.is_none() && flat.missed.is_some()),
                }
            }
        }
    }
}

#[test]
fn a_coarser_look_takes_as_many_landmarks_and_all_that_are_named() {
    let mut heads = index(90, 0.7);
    for (scan, count) in SCANS.into_iter().flat_map(|scan| [(scan, 1), (scan, 3)]) {
        let queries = queries(count);
        let asked = (80, 24, &[5u32, 633][..]);
        for (own, index) in taken(&mut heads, &queries, scan, asked).iter().zip(&heads) {
            assert_eq!(own.marks.len(), 24, "{scan:?}");
            assert!(own.marks.is_sorted_by(|a, b| a.0 < b.0), "{scan:?}");
            for pin in [5, 633] {
                assert!(own.marks.contains(&(pin, f32::INFINITY)), "{scan:?}");
            }
            assert!(!index.outliers(80).is_empty());
        }
    }
}

#[test]
fn codes_take_the_keys_of_most_votes_and_those_that_are_named() {
    let mut heads = index(90, 0.7);
    for count in [1, 3] {
        let queries = queries(count);
        let asked = (80, 200, &[5u32, 4633][..]);
        let taken = taken(&mut heads, &queries, LandmarkScan::KeyCodes, asked);
        for (head, own) in taken.iter().enumerate() {
            assert_eq!(own.marks.len(), 200);
            assert!(own.marks.is_sorted_by(|a, b| a.0 < b.0));
            assert!(own.marks.iter().all(|(key, _)| *key < 80 * PAGE_TOKENS as u32));
            for pin in [5, 4633] {
                assert!(own.marks.contains(&(pin, f32::INFINITY)));
            }
            // A mark that is taken has no fewer votes than one that is not, and all votes are of one sum.
            assert_eq!(own.missed.as_ref().map(Vec::len), Some(queries.group), "{head}");
        }
    }
    // Every key of few pages.
    let all = taken_all(&mut heads);
    assert!(all.iter().all(|own| own.marks.len() == 2 * PAGE_TOKENS));
}

fn taken_all(heads: &mut [HeadIndex]) -> Vec<Taken> {
    taken(heads, &queries(1), LandmarkScan::KeyCodes, (2, 2 * PAGE_TOKENS, &[]))
}

#[test]
fn tokens_that_votes_stand_for_are_taken_by_every_scan() {
    let mut heads = index(90, 0.7);
    let (planes, rotation) = (Planes::new(D), Rotation::new(D));
    let queries = queries(1);
    let standing = [vec![(77, 9.0), (4700, 1e-30)], vec![(2001, 9.0)]];
    for scan in [LandmarkScan::Flat, LandmarkScan::KeyCodes].into_iter().chain(SCANS) {
        heads.iter_mut().for_each(|head| head.prepare(scan, &planes, D));
        let span = span_of(scan) as u32;
        let plain = Scan::plain(&heads, (90, 24), &planes, Some(&rotation));
        let without = plain.take(scan, &queries, &mut Ballot::default());
        let named = Named { standing: &standing, ..plain.named };
        let beside = Scan { named, ..plain };
        let taken = beside.take(scan, &queries, &mut Ballot::default());
        for (head, token) in [(0, 77u32), (1, 2001)] {
            let has = |taken: &Taken| taken.marks.contains(&(token / span, 9.0));
            assert!(has(&taken[head]) && !has(&without[head]), "{scan:?}");
        }
        // A vote smaller than its own changes nothing.
        assert!(taken[0].marks.iter().all(|(_, vote)| *vote > 1e-30), "{scan:?}");
    }
}

#[test]
fn keys_within_reach_of_an_asked_one_come_along() {
    let mut heads = index(90, 0.7);
    let (planes, rotation) = (Planes::new(D), Rotation::new(D));
    heads.iter_mut().for_each(|head| head.prepare(LandmarkScan::KeyCodes, &planes, D));
    let queries = queries(1);
    let plain = || Scan::plain(&heads, (90, 40), &planes, Some(&rotation));
    let take = |scan: Scan<'_>| scan.take(LandmarkScan::KeyCodes, &queries, &mut Ballot::default());
    let (alone, along) = (take(plain()), take(Scan { reach: 3, ..plain() }));
    for (alone, along) in alone.iter().zip(&along) {
        let vote = |taken: &Taken, i: usize| taken.marks[i].1;
        let best = (0..40).max_by(|a, b| vote(alone, *a).total_cmp(&vote(alone, *b))).unwrap();
        let (key, most) = alone.marks[best];
        for near in key.saturating_sub(3)..=key + 3 {
            assert!(along.marks.contains(&(near, most)), "{near} of {key}");
        }
    }
}

#[test]
fn landmarks_within_reach_of_an_asked_one_come_along_also_from_the_next_page() {
    let mut heads = index(90, 0.7);
    let (planes, queries) = (Planes::new(D), queries(1));
    for scan in [LandmarkScan::Flat, LandmarkScan::TwoLevel, LandmarkScan::SignHash] {
        heads.iter_mut().for_each(|head| head.prepare(scan, &planes, D));
        let plain = || Scan::plain(&heads, (90, 24), &planes, None);
        let take = |own: Scan<'_>| own.take(scan, &queries, &mut Ballot::default());
        // Nine keys reach two landmarks.
        let (alone, along) = (take(plain()), take(Scan { reach: 9, ..plain() }));
        let mut of_the_next_page = 0;
        for (alone, along) in alone.iter().zip(&along) {
            let mut asked = alone.marks.clone();
            asked.sort_by(|a, b| b.1.total_cmp(&a.1));
            // As many as there is room for, with two to either side; codes pass over some that are asked for more.
            let sure = if scan == LandmarkScan::SignHash { 1 } else { 4 };
            for (mark, _) in &asked[..sure] {
                for near in mark.saturating_sub(2)..=(mark + 2).min(90 * MARKS as u32 - 1) {
                    let is_there = along.marks.iter().any(|(own, _)| *own == near);
                    assert!(is_there, "{scan:?}: {near} of {mark}");
                    of_the_next_page += u32::from(near / MARKS as u32 != mark / MARKS as u32);
                }
            }
        }
        assert!(of_the_next_page > 0 || scan == LandmarkScan::SignHash, "{scan:?}");
    }
}

#[test]
fn means_of_pages_of_equal_keys_stand_for_all_that_is_not_scored() {
    let mut heads = index(90, 0.0);
    let queries = queries(1);
    let planes = Planes::new(D);
    heads.iter_mut().for_each(|head| head.prepare(LandmarkScan::TwoLevel, &planes, D));
    let take = |scan: LandmarkScan, reach: usize| {
        let own = Scan { reach, ..Scan::plain(&heads, (90, 24), &planes, None) };
        own.take(scan, &queries, &mut Ballot::default())
    };
    // Within reach of the open pages some landmarks of shut ones are scored too.
    let pairs = [0, 9].into_iter().flat_map(|reach| {
        let of_heads = take(LandmarkScan::TwoLevel, reach).into_iter();
        of_heads.zip(take(LandmarkScan::Flat, reach)).map(move |(own, flat)| (reach, own, flat))
    });
    for (reach, own, flat) in pairs {
        if reach == 0 {
            assert_eq!(
                own.marks.iter().map(|(mark, _)| mark).collect::<Vec<_>>(),
                flat.marks.iter().map(|(mark, _)| mark).collect::<Vec<_>>()
            );
        }
        let pairs = own.missed.iter().flatten().zip(flat.missed.iter().flatten());
        for ((max, sum), (flat_max, flat_sum)) in pairs {
            let (own, flat) = (max + sum.ln(), flat_max + flat_sum.ln());
            assert!((own - flat).abs() < 1e-2, "{own}, expected {flat}");
        }
    }
}

#[test]
fn few_pages_are_scanned_flat_and_the_default_changes_at_524288_tokens() {
    use LandmarkScan::{Auto, Flat, KeyCodes, SignHash, TwoLevel};
    for asked in [Auto, KeyCodes] {
        assert_eq!(settled(asked, 8192, false), Flat);
        assert_eq!(settled(asked, 8193, false), TwoLevel);
        assert_eq!(settled(asked, 8193, true), KeyCodes);
    }
    assert_eq!(settled(SignHash, 8193, true), SignHash);
    assert_eq!(scan_for(KeyCodes, 1, 1024), KeyCodes);
    assert!(reads_every_key(Auto, 8192) && !reads_every_key(Auto, 8193));
    assert!(reads_every_key(KeyCodes, 8193) && !reads_every_key(Flat, 1));
    // More landmarks would be left than there are.
    assert_eq!(scan_for(TwoLevel, 2048, 1024), Flat);
    assert_eq!(scan_for(TwoLevel, 2049, 1024), TwoLevel);
    assert_eq!(scan_for(SignHash, 512, 1024), Flat);
    assert_eq!(scan_for(SignHash, 513, 1024), SignHash);
    assert_eq!(scan_for(SignHash, CENTRE_PAGES - 1, 8), Flat);
    assert_eq!(scan_for(Flat, 1 << 20, 8), Flat);
}
