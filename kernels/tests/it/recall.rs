//! Stored pages: the choice by its definition in f64, and the copy of the chosen.

use crate::select::random;
use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use mka_kernels::recall::{
    Choice, ChoiceParams, ChoiceRun, MARKS, Placement, SPAN, Standing, StoredPages, note_share,
};
use mka_kernels::{PAGE_TOKENS, RotaryAngles, reference, rows};

/// Pages, queries and what a choice among them is made by.
pub(crate) struct Case {
    pub(crate) pages: usize,
    pub(crate) t: usize,
    pub(crate) h: usize,
    pub(crate) g: usize,
    pub(crate) d: usize,
    pub(crate) tokens: usize,
    pub(crate) dtype: DType,
    pub(crate) pins: &'static [u32],
    pub(crate) outliers: &'static [u32],
    /// Whether every token is compared, whatever its landmark is asked for.
    pub(crate) every: bool,
    /// Neighbouring queries that vote as one.
    pub(crate) pooled: usize,
    /// Places around a token whose votes count for it.
    pub(crate) reach: usize,
    /// Whether all heads choose the same tokens.
    pub(crate) together: bool,
}

pub(crate) const PLAIN: Case = Case {
    pages: 3,
    t: 1,
    h: 2,
    g: 1,
    d: 16,
    tokens: 64,
    dtype: DType::F32,
    pins: &[],
    outliers: &[],
    every: false,
    pooled: POOLED,
    reach: 0,
    together: false,
};

const MANY: Case = Case { tokens: 128, dtype: DType::BF16, ..PLAIN };

pub(crate) const CASES: &[Case] = &[
    PLAIN,
    Case { pages: 40, h: 9, g: 3, d: 64, tokens: 128, dtype: DType::BF16, ..PLAIN },
    Case { pages: 40, t: 64, h: 9, g: 3, d: 64, tokens: 128, dtype: DType::BF16, ..PLAIN },
    Case { pages: 70, t: 11, h: 8, g: 2, d: 128, tokens: 192, ..PLAIN },
    Case { pages: 33, h: 4, g: 4, d: 96, tokens: 64, dtype: DType::BF16, pins: &[3, 77], ..PLAIN },
    Case { pages: 50, t: 3, h: 6, g: 2, d: 64, pins: &[0, 399], outliers: &[5, 210, 390], ..PLAIN },
    Case { pages: 50, h: 14, g: 2, d: 256, outliers: &[0, 1, 7, u32::MAX], ..PLAIN },
    Case { pages: 40, t: 11, h: 9, g: 3, d: 64, dtype: DType::BF16, every: true, ..PLAIN },
    Case { pages: 50, h: 6, g: 2, d: 64, pins: &[0, 399], outliers: &[5], every: true, ..PLAIN },
    // Its votes are more than one block of a selection reads.
    Case { pages: 300, h: 6, g: 2, d: 16, tokens: 2048, every: true, ..PLAIN },
    Case { pages: 40, t: 11, h: 9, g: 3, d: 64, every: true, together: true, ..PLAIN },
    Case { pages: 50, h: 4, g: 4, d: 96, pins: &[9], every: true, together: true, ..PLAIN },
    Case { pages: 40, t: 11, h: 9, g: 3, d: 64, every: true, reach: 4, ..PLAIN },
    Case { pages: 70, h: 6, g: 2, d: 64, tokens: 192, pins: &[0, 399], reach: 2, ..PLAIN },
    Case { pages: 40, t: 11, h: 9, g: 3, d: 64, pooled: 1, reach: 4, ..PLAIN },
    Case { pages: 50, h: 4, g: 4, pins: &[9], every: true, reach: 70, together: true, ..PLAIN },
    // Many rows of queries, which tensor cores score, but for the last.
    Case { pages: 40, t: 40, h: 6, g: 2, d: 96, every: true, reach: 64, ..MANY },
    Case { pages: 40, t: 60, h: 8, g: 2, d: 128, every: true, reach: 4, ..MANY },
    Case { pages: 40, t: 30, h: 4, g: 2, d: 40, pooled: 1, pins: &[3, 77], ..MANY },
    Case { pages: 20, t: 40, h: 8, g: 2, d: 256, pooled: 1, ..MANY },
    // Fewer tokens than are chosen.
    Case { pages: 2, h: 6, g: 2, d: 8, tokens: 256, ..PLAIN },
];

/// What a case is made of, on the host.
pub(crate) struct Made {
    pub(crate) q: Vec<f32>,
    /// (pages, g, PAGE_TOKENS, d), as stored.
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
    /// (pages · MARKS, g, d), as stored.
    landmarks: Vec<f32>,
    /// (outliers · SPAN, g, d), as stored.
    outlier_keys: Vec<f32>,
    pub(crate) angles: RotaryAngles,
}

const DISTANCE: usize = 20;
const POOLED: usize = 8;

impl Case {
    pub(crate) fn make(&self) -> Made {
        let Self { pages, t, h, g, d, dtype, .. } = *self;
        let stored = |x: Vec<f32>, dtype: DType| -> Vec<f32> {
            let round = |x: f32| if dtype == DType::F32 { x } else { bf16::from_f32(x).to_f32() };
            x.into_iter().map(round).collect()
        };
        let size = pages * g * PAGE_TOKENS * d;
        let keys = stored(random(2, size), dtype);
        let means = reference::landmarks(&keys, (pages, g, d), SPAN, &vec![PAGE_TOKENS; pages]);
        // (pages, g, MARKS, d) to (pages · MARKS, g, d).
        let mut landmarks = Vec::with_capacity(means.len());
        for mark in 0..pages * MARKS {
            for head in 0..g {
                let at = ((mark / MARKS * g + head) * MARKS + mark % MARKS) * d;
                landmarks.extend(means[at..at + d].iter().map(|x| *x as f32));
            }
        }
        let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.9f64.powi(i as i32)).collect();
        Made {
            q: random(1, t * h * d).iter().map(|x| x * 6.0).collect(),
            keys,
            values: stored(random(3, size), dtype),
            landmarks: stored(landmarks, DType::BF16),
            outlier_keys: stored(random(4, self.outliers.len() * SPAN * g * d), DType::BF16),
            angles: RotaryAngles::new(0..(pages * PAGE_TOKENS + 64) as u64, &frequencies, 1.0),
        }
    }

    pub(crate) fn store(&self, made: &Made, device: &Device) -> Result<StoredPages> {
        let bytes = |x: &[f32], dtype: DType| -> Vec<u8> {
            match dtype {
                DType::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
                _ => x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            }
        };
        let mut store = StoredPages::new(self.g, self.d, self.dtype, device)?;
        let (page, marks) = (self.g * PAGE_TOKENS * self.d, self.g * MARKS * self.d);
        // In several batches, so that it grows on the way.
        for first in (0..self.pages).step_by(7) {
            let end = self.pages.min(first + 7);
            store.push(
                &bytes(&made.keys[first * page..end * page], self.dtype),
                &bytes(&made.values[first * page..end * page], self.dtype),
                &bytes(&made.landmarks[first * marks..end * marks], DType::BF16),
                self.pages,
            )?;
        }
        store
            .set_outliers(&self.outliers.repeat(self.g), &bytes(&made.outlier_keys, DType::BF16))?;
        Ok(store)
    }

    pub(crate) fn choose(
        &self,
        made: &Made,
        store: &StoredPages,
        device: &Device,
    ) -> Result<Choice> {
        self.choose_runs(
            made,
            store,
            device,
            0,
            &[ChoiceRun { queries: self.t, pages: self.pages }],
        )
    }

    /// The choice of `runs`, from query `first` on.
    pub(crate) fn choose_runs(
        &self,
        made: &Made,
        store: &StoredPages,
        device: &Device,
        first: usize,
        runs: &[ChoiceRun],
    ) -> Result<Choice> {
        self.choose_beside(made, store, device, first, runs, None)
    }

    /// [`Case::choose_runs`] beside votes that stand; its own votes are kept.
    pub(crate) fn choose_beside(
        &self,
        made: &Made,
        store: &StoredPages,
        device: &Device,
        first: usize,
        runs: &[ChoiceRun],
        standing: Option<&Standing>,
    ) -> Result<Choice> {
        let q = Tensor::from_slice(&made.q, (self.t, self.h, self.d), device)?;
        let q = q.narrow(0, first, runs.iter().map(|run| run.queries).sum())?;
        self.choose_for(&q, made, store, runs, standing)
    }

    /// The choice of `runs` for `q`, whether they are its queries or not.
    fn choose_for(
        &self,
        q: &Tensor,
        made: &Made,
        store: &StoredPages,
        runs: &[ChoiceRun],
        standing: Option<&Standing>,
    ) -> Result<Choice> {
        let pins = match self.pins.len() {
            0 => None,
            count => Some(Tensor::from_slice(self.pins, count, q.device())?),
        };
        store.choose(
            q,
            &ChoiceParams {
                runs,
                tokens: self.tokens,
                landmarks: (!self.every).then_some(4 * self.tokens / SPAN),
                pooled: self.pooled,
                scale: 0.25,
                angles: &made.angles,
                distance: DISTANCE,
                pins: pins.as_ref(),
                reach: self.reach,
                standing,
                keep_votes: !self.together,
                heads_together: self.together,
            },
        )
    }

    /// Votes of `keys` (n, d) by the pooled queries of `head`, in f64.
    fn votes(&self, made: &Made, head: usize, keys: &[f32]) -> Vec<f64> {
        let (h, d, group) = (self.h, self.d, self.h / self.g);
        let mut q = made.q.clone();
        let (cos, sin) = made.angles.at(DISTANCE);
        q.chunks_exact_mut(d).for_each(|row| rows::rotate_row(row, cos, sin));
        let mut votes = vec![0f64; keys.len() / d];
        for queries in q.chunks(self.pooled * h * d) {
            let count = queries.len() / (h * d);
            let mut sum = vec![0f64; votes.len()];
            for own in head * group..(head + 1) * group {
                let mean = |x: usize| -> f64 {
                    let of = |token: usize| f64::from(queries[(token * h + own) * d + x]);
                    (0..count).map(of).sum::<f64>() / count as f64 * 0.25
                };
                let mean: Vec<f64> = (0..d).map(mean).collect();
                let score = |key: &[f32]| -> f64 {
                    key.iter().zip(&mean).map(|(k, q)| f64::from(*k) * q).sum::<f64>().exp()
                };
                let scores: Vec<f64> = keys.chunks_exact(d).map(score).collect();
                let total: f64 = scores.iter().sum();
                sum.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += score / total);
            }
            votes.iter_mut().zip(sum).for_each(|(vote, sum)| *vote = vote.max(sum));
        }
        votes
    }

    /// The tokens of each head by the definition of the choice.
    pub(crate) fn expected(&self, made: &Made) -> Vec<Vec<u32>> {
        let Self { pages, g, d, .. } = *self;
        let num_marks = pages * MARKS;
        let best = |votes: &[f64], k: usize| -> Vec<u32> {
            let votes: Vec<f32> = votes.iter().map(|x| *x as f32).collect();
            reference::top_k(&votes, k.min(votes.len()))
        };
        let of_head = |head: usize| {
            let row = |rows: &[f32], i: usize| rows[(i * g + head) * d..][..d].to_vec();
            let mut keys: Vec<f32> = (0..num_marks).flat_map(|i| row(&made.landmarks, i)).collect();
            let owners: Vec<usize> = self.outliers.iter().map(|mark| *mark as usize).collect();
            for (i, owner) in owners.iter().enumerate() {
                if *owner < num_marks {
                    keys.extend(
                        (i * SPAN..(i + 1) * SPAN).flat_map(|i| row(&made.outlier_keys, i)),
                    );
                }
            }
            let votes = self.votes(made, head, &keys);
            let mut by_mark = votes[..num_marks].to_vec();
            for (owner, keys) in owners.iter().zip(votes[num_marks..].chunks_exact(SPAN)) {
                by_mark[*owner] = keys.iter().copied().fold(by_mark[*owner], f64::max);
            }
            // A pinned landmark asks for no other.
            self.pins.iter().for_each(|pin| by_mark[*pin as usize] = 0.0);
            let near = self.reach.div_ceil(SPAN);
            let within = |i: usize| {
                let others = i.saturating_sub(near)..(i + near + 1).min(num_marks);
                others.map(|j| by_mark[j]).fold(0.0, f64::max)
            };
            let mut by_mark: Vec<f64> = (0..num_marks).map(within).collect();
            self.pins.iter().for_each(|pin| by_mark[*pin as usize] = f64::INFINITY);
            let wanted = if self.every { num_marks } else { 4 * self.tokens / SPAN };
            let marks = best(&by_mark, wanted);
            let mut keys = Vec::new();
            for mark in &marks {
                for token in *mark as usize * SPAN..(*mark as usize + 1) * SPAN {
                    let at = (token / PAGE_TOKENS * g + head) * PAGE_TOKENS + token % PAGE_TOKENS;
                    keys.extend_from_slice(&made.keys[at * d..(at + 1) * d]);
                }
            }
            let token = |i: usize| marks[i / SPAN] as usize * SPAN + i % SPAN;
            let mut alone = self.votes(made, head, &keys);
            // A pinned token asks for no other.
            let pinned = marks.iter().zip(alone.chunks_exact_mut(SPAN));
            let pinned = pinned.filter(|(mark, _)| self.pins.contains(mark));
            pinned.for_each(|(_, votes)| votes.fill(0.0));
            let near = |i: usize| {
                let others =
                    (0..alone.len()).filter(|j| token(*j).abs_diff(token(i)) <= self.reach);
                others.map(|j| alone[j]).fold(0.0, f64::max)
            };
            let mut votes: Vec<f64> = (0..alone.len()).map(near).collect();
            for (mark, votes) in marks.iter().zip(votes.chunks_exact_mut(SPAN)) {
                if self.pins.contains(mark) {
                    votes.fill(f64::INFINITY);
                }
            }
            (marks, votes)
        };
        let mut heads: Vec<(Vec<u32>, Vec<f64>)> = (0..g).map(of_head).collect();
        if self.together {
            let sum = |i: usize| heads.iter().map(|(_, votes)| votes[i]).sum::<f64>();
            let sums: Vec<f64> = (0..pages * PAGE_TOKENS).map(sum).collect();
            heads.iter_mut().for_each(|(_, votes)| votes.clone_from(&sums));
        }
        let of_head = |(marks, votes): &(Vec<u32>, Vec<f64>)| {
            let token = |i: u32| marks[i as usize / SPAN] * SPAN as u32 + i % SPAN as u32;
            best(votes, self.tokens).into_iter().map(token).collect()
        };
        heads.iter().map(of_head).collect()
    }

    /// What `gather` gives for `tokens`: keys and values.
    pub(crate) fn gathered(
        &self,
        made: &Made,
        tokens: &[Vec<u32>],
        placement: Placement,
    ) -> (Vec<f32>, Vec<f32>) {
        let Self { g, d, .. } = *self;
        let pages = tokens[0].len().div_ceil(PAGE_TOKENS);
        let mut keys = vec![0f32; pages * g * PAGE_TOKENS * d];
        let mut values = keys.clone();
        for (head, tokens) in tokens.iter().enumerate() {
            for (i, token) in tokens.iter().enumerate() {
                let at =
                    |i: usize| ((i / PAGE_TOKENS * g + head) * PAGE_TOKENS + i % PAGE_TOKENS) * d;
                let (from, to) = (at(*token as usize), at(i));
                values[to..to + d].copy_from_slice(&made.values[from..from + d]);
                keys[to..to + d].copy_from_slice(&made.keys[from..from + d]);
                let position = match placement {
                    Placement::Stream(first) => first + u64::from(*token),
                    Placement::Compact(first) => first + i as u64,
                };
                let (cos, sin) = made.angles.at(position as usize);
                rows::rotate_row(&mut keys[to..to + d], cos, sin);
            }
        }
        (keys, values)
    }
}

/// Tokens of `a` that `b` has not, of all heads.
pub(crate) fn differing(a: &[Vec<u32>], b: &[Vec<u32>]) -> usize {
    let missing = |(a, b): (&Vec<u32>, &Vec<u32>)| {
        assert_eq!(a.len(), b.len());
        assert!(a.is_sorted() && b.is_sorted());
        a.iter().filter(|token| b.binary_search(token).is_err()).count()
    };
    a.iter().zip(b).map(missing).sum()
}

pub(crate) fn flat(x: &Tensor) -> Result<Vec<f32>> {
    x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

#[test]
fn a_choice_among_stored_pages_is_the_one_of_its_definition() -> Result<()> {
    for (i, case) in CASES.iter().enumerate() {
        let made = case.make();
        let store = case.store(&made, &Device::Cpu)?;
        assert_eq!(store.len(), case.pages);
        let choice = case.choose(&made, &store, &Device::Cpu)?;
        let tokens = choice.tokens(case.g)?;
        assert_eq!(tokens[0].len(), case.tokens.min(case.pages * PAGE_TOKENS));
        // Votes a rounding apart may change places at the threshold.
        let off = differing(&tokens, &case.expected(&made));
        assert!(off <= case.g, "case {i}: {off} other tokens");
        let recovered = choice.recovered.map(|x| flat(&x)).transpose()?;
        assert_eq!(recovered.is_some(), case.t == 1);
        assert!(recovered.is_none_or(|x| x[0] > 0.0 && x[0] <= 1.0), "case {i}");
        for placement in [Placement::Stream(5), Placement::Compact(64)] {
            let (keys, values) = store.gather(
                &case.choose(&made, &store, &Device::Cpu)?,
                &made.angles,
                placement,
            )?;
            let expected = case.gathered(&made, &tokens, placement);
            assert!((flat(&keys)?, flat(&values)?) == expected, "case {i}");
        }
    }
    Ok(())
}

/// Runs of queries that see ever more pages, as a prompt's blocks do: more than landmarks are taken, and fewer.
pub(crate) fn runs() -> [(Case, Vec<ChoiceRun>); 4] {
    let run = |queries, pages| ChoiceRun { queries, pages };
    let case = Case { t: 110, h: 9, g: 3, d: 64, tokens: 128, dtype: DType::BF16, ..PLAIN };
    [
        (
            Case { pages: 40, outliers: &[5, 210, 276, 300], pins: &[3, 290], ..case },
            vec![run(30, 34), run(64, 35), run(16, 40)],
        ),
        (Case { pages: 8, tokens: 192, ..case }, vec![run(40, 3), run(70, 8)]),
        (
            Case { pages: 300, d: 8, pins: &[3, 290], every: true, ..case },
            vec![run(30, 280), run(64, 281), run(16, 300)],
        ),
        (
            Case { pages: 300, d: 8, every: true, together: true, ..case },
            vec![run(30, 280), run(64, 281), run(16, 300)],
        ),
    ]
}

#[test]
fn runs_of_queries_choose_as_each_by_itself() -> Result<()> {
    for (case, runs) in runs() {
        let made = case.make();
        let store = case.store(&made, &Device::Cpu)?;
        let choice = case.choose_runs(&made, &store, &Device::Cpu, 0, &runs)?;
        let (keys, values) = store.gather(&choice, &made.angles, Placement::Compact(64))?;
        let tokens = choice.tokens(case.g)?;
        let pages = case.tokens.div_ceil(PAGE_TOKENS);
        let mut first = 0;
        for (i, run) in runs.iter().enumerate() {
            let alone = case.choose_runs(&made, &store, &Device::Cpu, first, &[*run])?;
            first += run.queries;
            assert_eq!(tokens[i * case.g..(i + 1) * case.g], alone.tokens(case.g)?);
            let (own_keys, own_values) =
                store.gather(&alone, &made.angles, Placement::Compact(64))?;
            let of = |x: &Tensor| flat(&x.narrow(0, i * pages, pages)?);
            assert!(of(&keys)? == flat(&own_keys)? && of(&values)? == flat(&own_values)?);
        }
        // Fewer tokens than are chosen, pages that are not there, a run of nothing, fewer queries than there are, and more.
        let run = |queries, pages| ChoiceRun { queries, pages };
        let q = Tensor::from_slice(&made.q, (case.t, case.h, case.d), &Device::Cpu)?;
        for bad in [
            vec![run(55, 1), run(55, 8)],
            vec![run(110, case.pages + 1)],
            vec![run(0, 3), run(110, 8)],
            vec![run(50, 8)],
            vec![run(60, 8), run(60, 8)],
        ] {
            let chosen = case.choose_for(&q, &made, &store, &bad, None);
            assert!(chosen.is_err(), "{bad:?}");
        }
    }
    Ok(())
}

/// Choices for which votes of queries before them stand, among keys and among landmarks.
pub(crate) const STANDING: [Case; 2] = [
    Case { pages: 40, t: 12, h: 9, g: 3, d: 64, tokens: 128, every: true, reach: 4, ..PLAIN },
    Case { pages: 90, t: 12, h: 6, g: 2, d: 64, tokens: 64, pins: &[9], ..PLAIN },
];

impl Case {
    /// What the last query chooses beside what the others voted for, in three runs: those that stand, and the choice.
    pub(crate) fn choose_last(
        &self,
        made: &Made,
        store: &StoredPages,
        device: &Device,
    ) -> Result<(Vec<Vec<u32>>, Choice)> {
        let run = |queries, pages| ChoiceRun { queries, pages };
        let before = self.choose_runs(made, store, device, 0, &[run(3, self.pages - 1)])?;
        let two = [run(6, self.pages - 1), run(2, self.pages)];
        let after = self.choose_runs(made, store, device, 3, &two)?;
        let mut tokens = before.tokens(self.g)?;
        tokens.extend(after.tokens(self.g)?);
        let kept = |choice: Choice| choice.standing.expect("votes are kept");
        let standing = kept(after).after(Some(&kept(before)), self.g)?;
        let last = [run(1, self.pages)];
        let choice = self.choose_beside(made, store, device, 11, &last, Some(&standing))?;
        Ok((tokens, choice))
    }
}

#[test]
fn votes_stand_beside_those_of_later_queries() -> Result<()> {
    let case = &STANDING[0];
    let (made, g) = (case.make(), case.g);
    let store = case.store(&made, &Device::Cpu)?;
    let (before, choice) = case.choose_last(&made, &store, &Device::Cpu)?;
    // By definition: the largest of the votes of all runs, in f64, each run with its own softmax and pages.
    let runs =
        [(0..3, case.pages - 1), (3..9, case.pages - 1), (9..11, case.pages), (11..12, case.pages)];
    let width = case.h * case.d;
    let mut expected = vec![vec![0f64; case.pages * PAGE_TOKENS]; g];
    for (queries, pages) in runs {
        let q = made.q[queries.start * width..queries.end * width].to_vec();
        let own = Made { q, ..case.make() };
        for (head, all) in expected.iter_mut().enumerate() {
            let key = |token: usize| {
                let at = (token / PAGE_TOKENS * g + head) * PAGE_TOKENS + token % PAGE_TOKENS;
                &made.keys[at * case.d..(at + 1) * case.d]
            };
            let keys: Vec<f32> = (0..pages * PAGE_TOKENS).flat_map(key).copied().collect();
            let alone = case.votes(&own, head, &keys);
            for (i, all) in all.iter_mut().enumerate().take(alone.len()) {
                let near = i.saturating_sub(case.reach)..(i + case.reach + 1).min(alone.len());
                *all = alone[near].iter().copied().fold(*all, f64::max);
            }
        }
    }
    let best = |votes: &Vec<f64>| {
        let votes: Vec<f32> = votes.iter().map(|x| *x as f32).collect();
        reference::top_k(&votes, case.tokens)
    };
    let expected: Vec<Vec<u32>> = expected.iter().map(best).collect();
    let off = differing(&choice.tokens(g)?, &expected);
    assert!(off <= g, "{off} other tokens");
    // It is neither the last query's own choice nor that of those before.
    let run = ChoiceRun { queries: 1, pages: case.pages };
    let alone = case.choose_runs(&made, &store, &Device::Cpu, 11, &[run])?.tokens(g)?;
    assert!(differing(&choice.tokens(g)?, &alone) > g);
    assert!(differing(&choice.tokens(g)?, &before[..g]) > g);
    Ok(())
}

#[test]
fn votes_stand_for_the_same_tokens_once_pages_before_them_are_gone() -> Result<()> {
    let case = &STANDING[0];
    let (made, g) = (case.make(), case.g);
    let mut store = case.store(&made, &Device::Cpu)?;
    let run = |queries, pages| ChoiceRun { queries, pages };
    let kept = case.choose_runs(&made, &store, &Device::Cpu, 0, &[run(11, case.pages)])?;
    let before = kept.tokens(g)?;
    let standing = kept.standing.expect("votes are kept");
    let by_head = standing.by_head(g)?;
    for (votes, before) in by_head.iter().zip(&before) {
        assert!(votes.iter().map(|(token, _)| token).eq(before));
        assert!(votes.iter().all(|(_, vote)| *vote > 0.0));
    }
    assert!(by_head.len() == g && standing.by_head(g + 1).is_err() && standing.by_head(0).is_err());
    (0..5).for_each(|_| store.pop_front());
    assert_eq!(store.gone(), 5);
    let last = [run(1, case.pages - 5)];
    let alone = case.choose_runs(&made, &store, &Device::Cpu, 11, &last)?.tokens(g)?;
    let beside = case.choose_beside(&made, &store, &Device::Cpu, 11, &last, Some(&standing))?;
    let gone = 5 * PAGE_TOKENS as u32;
    for (head, tokens) in beside.tokens(g)?.iter().enumerate() {
        let new = tokens.iter().filter(|token| alone[head].binary_search(token).is_err());
        let stood = new.map(|token| before[head].binary_search(&(token + gone)).is_ok());
        let stood: Vec<bool> = stood.collect();
        assert!(!stood.is_empty() && stood.iter().all(|stood| *stood), "head {head}");
    }
    // What it keeps is counted as before.
    let again = beside.standing.expect("votes are kept").after(Some(&standing), g)?;
    for (both, before) in again.by_head(g)?.iter().zip(&by_head) {
        assert!(both.len() == 2 * before.len() && both.starts_with(before));
    }
    let third = case.choose_beside(&made, &store, &Device::Cpu, 11, &last, Some(&again))?;
    assert_eq!(
        third.tokens(g)?,
        case.choose_beside(&made, &store, &Device::Cpu, 11, &last, Some(&standing))?.tokens(g)?
    );
    Ok(())
}

#[test]
fn standing_votes_bring_landmarks_along_and_fit_one_run() -> Result<()> {
    let case = &STANDING[1];
    let (made, g) = (case.make(), case.g);
    let store = case.store(&made, &Device::Cpu)?;
    let (before, choice) = case.choose_last(&made, &store, &Device::Cpu)?;
    // Some of what is chosen now was chosen before, under a landmark that the last query alone passes over.
    let last = [ChoiceRun { queries: 1, pages: case.pages }];
    let alone = case.choose_runs(&made, &store, &Device::Cpu, 11, &last)?;
    let (own, without) = (choice.tokens(g)?, alone.tokens(g)?);
    let stands = |token: &u32, head: usize| {
        let of_landmark = |other: &u32| *other as usize / SPAN == *token as usize / SPAN;
        before.iter().skip(head).step_by(g).any(|list| list.binary_search(token).is_ok())
            && !without[head].iter().any(of_landmark)
    };
    let new = (0..g).flat_map(|head| own[head].iter().filter(move |token| stands(token, head)));
    assert!(new.count() > 0);
    let standing = alone.standing.expect("votes are kept");
    let two = [ChoiceRun { queries: 1, pages: 80 }, ChoiceRun { queries: 1, pages: 90 }];
    let refused = case.choose_beside(&made, &store, &Device::Cpu, 0, &two, Some(&standing));
    let error = refused.expect_err("two runs").to_string();
    assert!(error.contains("for 2 runs of 2 heads, expected"), "{error}");
    Ok(())
}

#[test]
fn pages_that_went_leave_the_others_as_they_were() -> Result<()> {
    let case = Case { pages: 40, h: 6, g: 2, d: 64, ..PLAIN };
    let made = case.make();
    let mut store = case.store(&made, &Device::Cpu)?;
    (0..30).for_each(|_| store.pop_front());
    store.truncate(7);
    let rest = Case { pages: 7, h: 6, g: 2, d: 64, ..PLAIN };
    let page = 2 * PAGE_TOKENS * 64;
    let of_rest = |x: &[f32]| x[30 * page..37 * page].to_vec();
    let expected = Made {
        q: made.q.clone(),
        keys: of_rest(&made.keys),
        values: of_rest(&made.values),
        landmarks: made.landmarks[30 * page / SPAN..37 * page / SPAN].to_vec(),
        outlier_keys: Vec::new(),
        angles: made.angles.clone(),
    };
    let choice = rest.choose(&made, &store, &Device::Cpu)?;
    assert_eq!(differing(&choice.tokens(2)?, &rest.expected(&expected)), 0);
    // Growing moves them to the front.
    let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let keys = bytes(&made.keys[..20 * page]);
    store.push(&keys, &keys, &vec![0; 20 * page / SPAN * 2], 27)?;
    assert_eq!(store.len(), 27);
    let choice = rest.choose(&made, &store, &Device::Cpu)?;
    assert_eq!(differing(&choice.tokens(2)?, &rest.expected(&expected)), 0);
    assert!(store.push(&keys[..4], &keys[..4], &[], 90).is_err());
    assert!(store.push(&keys, &keys, &vec![0; 20 * page / SPAN * 2], 27).is_err());
    Ok(())
}

#[test]
fn pages_of_another_shape_or_beyond_the_limit_are_refused() -> Result<()> {
    let mut store = StoredPages::new(2, 16, DType::F32, &Device::Cpu)?;
    let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, &Device::Cpu);
    let pages = zeros(&[3, 2, PAGE_TOKENS, 16], DType::F32)?;
    let landmarks = zeros(&[3 * MARKS, 2, 16], DType::BF16)?;
    let others: [&[usize]; 4] = [&[], &[3], &[3, 2, PAGE_TOKENS], &[3, 1, PAGE_TOKENS, 16]];
    for shape in others {
        let other = zeros(shape, DType::F32)?;
        assert!(store.append(&other, &other, &landmarks, 20).is_err(), "{shape:?}");
        assert!(store.append(&pages, &other, &landmarks, 20).is_err(), "{shape:?}");
        assert!(store.append(&pages, &pages, &other, 20).is_err(), "{shape:?}");
    }
    assert!(store.append(&pages, &pages, &landmarks, 2).is_err());
    let capacity = store.capacity();
    let error = store.reserve(21, 20).unwrap_err().to_string();
    assert!(error.contains("21 pages, expected at most 20"), "{error}");
    assert_eq!((store.len(), store.capacity()), (0, capacity));
    store.reserve(20, 20)?;
    assert_eq!((store.len(), store.capacity()), (0, 20));
    store.append(&pages, &pages, &landmarks, 20)?;
    assert_eq!((store.len(), store.capacity()), (3, 20));
    Ok(())
}

#[test]
fn named_tokens_are_copied_and_none_is_read_beyond_the_last() -> Result<()> {
    let case = Case { pages: 3, h: 4, g: 2, d: 16, ..PLAIN };
    let made = case.make();
    let store = case.store(&made, &Device::Cpu)?;
    let named = Tensor::new(&[[0u32, 70, 191, 4_000_000_000], [3, 4, 5, 6]], &Device::Cpu)?;
    let choice = store.choice_of(&named)?;
    let tokens = choice.tokens(case.g)?;
    assert_eq!(tokens, [[0, 70, 191, 191], [3, 4, 5, 6]]);
    let (keys, values) = store.gather(&choice, &made.angles, Placement::Compact(64))?;
    let expected = case.gathered(&made, &tokens, Placement::Compact(64));
    assert!((flat(&keys)?, flat(&values)?) == expected);
    assert!(store.choice_of(&named.narrow(0, 0, 1)?).is_err());
    assert!(store.choice_of(&named.to_dtype(DType::F32)?).is_err());
    Ok(())
}

#[test]
fn no_landmark_and_pages_that_are_gone_are_refused_and_any_reach_is_taken() -> Result<()> {
    let made = PLAIN.make();
    let mut store = PLAIN.store(&made, &Device::Cpu)?;
    let q = Tensor::from_slice(&made.q, (PLAIN.t, PLAIN.h, PLAIN.d), &Device::Cpu)?;
    let runs = [ChoiceRun { queries: PLAIN.t, pages: PLAIN.pages }];
    let params = ChoiceParams {
        runs: &runs,
        tokens: PLAIN.tokens,
        landmarks: Some(0),
        pooled: POOLED,
        scale: 0.25,
        angles: &made.angles,
        distance: DISTANCE,
        pins: None,
        reach: 0,
        standing: None,
        keep_votes: false,
        heads_together: false,
    };
    let error = store.choose(&q, &params).unwrap_err().to_string();
    assert!(error.contains("0 landmarks, expected"), "{error}");
    for landmarks in [None, Some(PLAIN.tokens / SPAN)] {
        let reaching = |reach| -> Result<Vec<Vec<u32>>> {
            store.choose(&q, &ChoiceParams { landmarks, reach, ..params })?.tokens(PLAIN.g)
        };
        assert_eq!(reaching(usize::MAX)?, reaching(PLAIN.pages * PAGE_TOKENS)?);
    }
    let choice = store.choose(&q, &ChoiceParams { landmarks: None, ..params })?;
    store.gather(&choice, &made.angles, Placement::Compact(0))?;
    store.truncate(PLAIN.pages - 1);
    let gone = store.gather(&choice, &made.angles, Placement::Compact(0));
    let error = gone.unwrap_err().to_string();
    assert!(error.contains("of 3 pages, of which 2 are stored"), "{error}");
    Ok(())
}

#[test]
fn shares_add_up() -> Result<()> {
    let sums = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let row = |x: &[f32]| Tensor::from_slice(x, (1, x.len()), &Device::Cpu);
    let recovered = Tensor::new(&[0.25f32], &Device::Cpu)?;
    note_share(&sums, &row(&[0.0, -1.0])?, &row(&[0.0, 0.0])?, Some(&recovered))?;
    note_share(&sums, &row(&[f32::NEG_INFINITY; 2])?, &row(&[0.0, 0.0])?, None)?;
    let sums = flat(&sums)?;
    assert_eq!(sums, [1.0, (-1f32).exp(), 0.25]);
    Ok(())
}
