//! What the loops of [`super`] are whatever the width of their registers: rows in blocks, columns in blocks.
//! Knows `block`, `columns`, `ROWS` and `LANES` of the file that asks for them, and what that has of [`super`].

/// `dot_rows` and `add_rows` for a processor with `$features`, which take `$most` queries or sums at once, or `$count` that
/// are left.
macro_rules! loops {
    ($features:literal, $most:literal: $($count:literal)+) => {
        /// # Safety
        /// The features of this file; `rows` reaches n · d numbers, d a multiple of LANES; `scores` has room for n scores
        /// behind each whole `stride` of queries.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn dot_rows<T: Number>(
            queries: &[f32],
            rows: *const u8,
            (n, d): (usize, usize),
            scores: &mut [f32],
            stride: usize,
            soon: Soon<'_>,
        ) {
            let per_row = soon.per_row(n);
            let row_bytes = d * size_of::<T>();
            let r = queries.len() / d;
            let blocks = n / ROWS * ROWS;
            let mut i = 0;
            while i < r {
                let count = (r - i).min($most);
                // SAFETY: `i + count` queries are there, and rows and scores as the caller says; the last rows have a block
                // of their own each.
                unsafe {
                    let queries = queries.as_ptr().add(i * d);
                    let scores = scores.as_mut_ptr().add(i * stride);
                    for j in (0..blocks).step_by(ROWS) {
                        if i == 0 {
                            soon.ask(j, per_row);
                        }
                        let (rows, scores) = (rows.add(j * row_bytes), scores.add(j));
                        match count {
                            $($count => block::<T, $count, ROWS>(queries, rows, d, scores, stride),)+
                            _ => unreachable!(),
                        }
                    }
                    for j in blocks..n {
                        let (rows, scores) = (rows.add(j * row_bytes), scores.add(j));
                        match count {
                            $($count => block::<T, $count, 1>(queries, rows, d, scores, stride),)+
                            _ => unreachable!(),
                        }
                    }
                }
                i += count;
            }
        }

        /// # Safety
        /// The features of this file; `rows` reaches n · d numbers, d a multiple of LANES; `weights` has n behind each whole
        /// `stride` of sums.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn add_rows<T: Number>(
            weights: &[f32],
            stride: usize,
            rows: *const u8,
            (n, d): (usize, usize),
            acc: &mut [f32],
            soon: Soon<'_>,
        ) {
            let r = acc.len() / d;
            let mut i = 0;
            while i < r {
                let count = (r - i).min($most);
                let mut x = 0;
                while x < d {
                    // SAFETY: the columns from x on, as many as a branch takes, are within every row and every sum.
                    unsafe {
                        let rows = rows.add(x * size_of::<T>());
                        let acc = acc.as_mut_ptr().add(i * d + x);
                        let weights = weights.as_ptr().add(i * stride);
                        let wide = (d - x) / LANES >= 4;
                        let soon = if x == 0 && i == 0 { soon } else { Soon::default() };
                        x += LANES
                            * match (count, wide) {
                                $(
                                    ($count, true) => {
                                        columns::<T, $count, 4>(weights, stride, rows, (n, d), acc, soon)
                                    }
                                    ($count, false) => {
                                        columns::<T, $count, 1>(weights, stride, rows, (n, d), acc, soon)
                                    }
                                )+
                                _ => unreachable!(),
                            };
                    }
                }
                i += count;
            }
        }
    };
}

pub(super) use loops;
