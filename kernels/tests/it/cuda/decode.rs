//! Few query rows over pages, by how their splits meet: in clusters on compute capability 9.0, in memory elsewhere.
//!
//! On a card of 9.0 too the splits meet in memory at head_dim 256, above 48 MiB of keys and values, and where one cluster
//! a head is more than the card holds at once (64 key/value heads on 132 multiprocessors).

use super::device;
use super::paged::{case, check};
use crate::attention::{Case, Inputs};
use candle_core::Result;
use mka_kernels::{PAGE_TOKENS, PageRef};

const DIMS: [usize; 4] = [64, 96, 128, 256];
/// Query heads on key/value heads.
const RATIOS: [(usize, usize); 6] = [(2, 2), (9, 3), (8, 2), (7, 1), (8, 1), (16, 1)];

fn grid(of: impl Fn(usize) -> Vec<Case>) -> Vec<Case> {
    DIMS.into_iter().flat_map(of).collect()
}

#[test]
fn decode_equals_its_definition_for_every_ratio_of_heads() -> Result<()> {
    let Some(gpu) = device("decode, ratios of heads") else { return Ok(()) };
    // One token; one page; splits without pages; each of eight splits one page, then two.
    let lengths = [0, 40, 200, 511, 1000];
    let cases = grid(|d| {
        let of = |heads| lengths.map(|before| case(1, heads, d, before));
        RATIOS.into_iter().flat_map(of).collect()
    });
    check(&gpu, &cases, |_| ())
}

#[test]
fn decode_equals_its_definition_in_several_clusters_a_head() -> Result<()> {
    let Some(gpu) = device("decode, several clusters") else { return Ok(()) };
    // The list in the launch up to 200 pages, in a table beyond; one tile and two.
    let cases = grid(|d| {
        vec![
            case(1, (3, 1), d, 15 * PAGE_TOKENS),
            case(1, (8, 2), d, 40 * PAGE_TOKENS + 5),
            case(2, (7, 1), d, 65 * PAGE_TOKENS - 2),
            case(16, (1, 1), d, 100 * PAGE_TOKENS + 3),
            case(1, (4, 1), d, 200 * PAGE_TOKENS - 1),
            case(4, (4, 1), d, 201 * PAGE_TOKENS + 17),
        ]
    });
    check(&gpu, &cases, |_| ())
}

#[test]
fn decode_equals_its_definition_behind_windows_and_among_hidden_pages() -> Result<()> {
    let Some(gpu) = device("decode, windows") else { return Ok(()) };
    let cases = grid(|d| {
        vec![
            Case { window: Some(500), ..case(2, (6, 2), d, 1300) },
            Case { sliding: Some(333), ..case(3, (8, 2), d, 1300) },
            Case { sliding: Some(1), ..case(5, (3, 1), d, 700) },
            Case { window: Some(2048), sliding: Some(1900), ..case(16, (1, 1), d, 2600) },
            Case { window: Some(64), ..case(4, (4, 1), d, 219 * PAGE_TOKENS) },
        ]
    });
    check(&gpu, &cases, |_| ())?;
    check(&gpu, &cases, Inputs::bias_pages)?;
    check(&gpu, &cases, |inputs| {
        // A page in which nothing is written yet.
        let empty = PageRef { len: 0, slot: 0, ..inputs.params.pages[5] };
        inputs.params.pages.insert(5, empty);
    })
}

#[test]
fn decode_equals_its_definition_where_splits_meet_in_memory() -> Result<()> {
    let Some(gpu) = device("decode, splits in memory") else { return Ok(()) };
    let mut cases = grid(|d| {
        vec![
            case(1, (64, 64), d, 0),
            case(1, (192, 64), d, 300),
            case(2, (64 * 7, 64), d, 129),
            Case { sliding: Some(100), ..case(3, (256, 64), d, 500) },
        ]
    });
    // 50 MiB, the list in the launch and in a table.
    cases.push(case(1, (32, 32), 128, 50 * PAGE_TOKENS - 1));
    cases.push(case(1, (16, 16), 64, 200 * PAGE_TOKENS + 17));
    check(&gpu, &cases, |_| ())
}
