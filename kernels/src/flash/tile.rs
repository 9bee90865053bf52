//! How blocks of the dense attention kernels divide the work, and the tiles of the 16-bit backward by head_dim.
//! Knows no device; `cuda/attention_backward_sm80.cu` and `cuda/attention.cuh` have the same numbers, which a test
//! reads there.

/// Lanes that share a row of {lse, delta}.
pub(super) const ROW_LANES: usize = 8;

/// How a block of one kernel works.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tile {
    /// Rows (queries or keys) that a block owns.
    pub(super) rows: usize,
    pub(super) warps: u32,
    pub(super) shared_bytes: usize,
}

/// The kernels of the backward for one head_dim.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BackwardTiles {
    /// The kernels of dk and dv, in the order of their launches: names without element type and head_dim.
    pub(super) kv_kernels: &'static [&'static str],
    /// What each of them works on.
    pub(super) kv: Tile,
    /// The kernel of dq.
    pub(super) q: Tile,
}

impl BackwardTiles {
    /// Those of 16 bits for head_dim 64, 96, 128 or 256, on a card that gives a block up to `card_bytes` of shared memory:
    /// where that is too little for warps that share their keys, a kernel of warps alone takes their place.
    pub(super) fn new(head_dim: usize, card_bytes: usize) -> Self {
        let tile = |warps, shared_bytes| Tile { rows: 128, warps, shared_bytes };
        let (kv, alone, q) = match head_dim {
            64 => (tile(4, 66_560), None, tile(4, 65_536)),
            96 => (tile(8, 132_096), Some(tile(8, 99_328)), tile(4, 73_728)),
            128 => (tile(8, 164_864), Some(tile(8, 98_816)), tile(4, 98_304)),
            _ => (tile(8, 164_096), None, tile(8, 163_840)),
        };
        match alone {
            Some(alone) if card_bytes < kv.shared_bytes => {
                Self { kv_kernels: &["kv_alone"], kv: alone, q }
            }
            _ if head_dim == 256 => Self { kv_kernels: &["kv_dk", "kv_dv"], kv, q },
            _ => Self { kv_kernels: &["kv"], kv, q },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const BACKWARD: &str = include_str!("../../cuda/attention_backward_sm80.cu");

    /// Shared memory that a block may have, in bytes: sm_86, sm_89 and sm_120; sm_80; sm_90.
    const CARDS: [usize; 3] = [99 << 10, 163 << 10, 227 << 10];

    /// By name and head_dim, the tiles that the kernels are compiled with.
    fn compiled() -> BTreeMap<(String, usize), Tile> {
        let arguments = |line: &'static str, kernel: &str| {
            let start = format!("  ATTENTION_BACKWARD_{kernel}(NAME, T, ");
            let (arguments, _) = line.strip_prefix(start.as_str())?.split_once(')')?;
            Some(arguments.split(", ").map(str::trim).collect::<Vec<_>>())
        };
        let number = |x: &str| x.parse::<usize>().expect("a number");
        let tile = |rows, warps: usize, bytes| Tile {
            rows,
            warps: warps as u32,
            shared_bytes: number(bytes),
        };
        let kv = BACKWARD.lines().filter_map(|line| arguments(line, "KV")).map(|x| {
            let [d, suffix, _, warps, partners, row_tiles, _, _, _, bytes] = x[..] else {
                panic!("{x:?}, expected the arguments of a kernel of dk and dv")
            };
            let keys = 16 * number(row_tiles) * number(warps) / number(partners);
            ((format!("kv{suffix}"), number(d)), tile(keys, number(warps), bytes))
        });
        let q = BACKWARD.lines().filter_map(|line| arguments(line, "Q")).map(|x| {
            let [d, warps, row_tiles, _, _, _, bytes] = x[..] else {
                panic!("{x:?}, expected the arguments of a kernel of dq")
            };
            let rows = 16 * number(row_tiles) * number(warps);
            (("q".to_owned(), number(d)), tile(rows, number(warps), bytes))
        });
        kv.chain(q).collect()
    }

    #[test]
    fn launches_have_the_tiles_that_the_kernels_are_compiled_with() {
        let mut launched = BTreeMap::new();
        for (d, card) in [64, 96, 128, 256].into_iter().flat_map(|d| CARDS.map(|card| (d, card))) {
            let tiles = BackwardTiles::new(d, card);
            launched.insert(("q".to_owned(), d), tiles.q);
            for kernel in tiles.kv_kernels {
                launched.insert((kernel.to_string(), d), tiles.kv);
            }
        }
        assert_eq!(launched, compiled());
        let lanes = format!("constexpr int ROW_LANES = {ROW_LANES};\n");
        assert!(include_str!("../../cuda/attention.cuh").contains(&lanes), "{lanes}");
    }

    #[test]
    fn launches_up_to_head_dim_128_fit_every_card() {
        for (d, card) in [64, 96, 128].into_iter().flat_map(|d| CARDS.map(|card| (d, card))) {
            let tiles = BackwardTiles::new(d, card);
            assert!(tiles.kv.shared_bytes.max(tiles.q.shared_bytes) <= card, "{d} in {card}");
        }
        for card in &CARDS[1..] {
            assert_eq!(BackwardTiles::new(128, *card).kv_kernels, ["kv"]);
            assert!(BackwardTiles::new(256, *card).kv.shared_bytes <= *card);
        }
    }
}
