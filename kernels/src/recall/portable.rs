//! The choice among stored pages and the copy of the chosen on the processor: what the kernels are tested against.
//! Knows no speed; a session on the processor chooses over its stored bytes instead.

use super::{Choice, ChoiceParams, ChoiceRun, MARKS, Placement, SPAN, Standing, StoredPages};
use crate::pages::PAGE_TOKENS;
use crate::rope::RotaryAngles;
use crate::rows;
use candle_core::{DType, Device, Result, Tensor};

/// The soft vote of one head.
struct Votes {
    /// Of the queries, the largest sum over the group's heads of their softmax.
    keys: Vec<f32>,
    /// For each head of the group, by key, of the last query.
    last: Vec<Vec<f32>>,
    /// For each head of the group, of the last query: ln Σ e^score.
    norms: Vec<f32>,
}

/// The tokens of one head that were compared.
struct Compared {
    /// Their landmarks.
    marks: Vec<u32>,
    votes: Votes,
    /// Votes by which the best are taken.
    by_token: Vec<f32>,
    /// What the landmarks that were not taken hold of all landmarks' votes, and the norms of these; None if all were.
    missed: Option<(f32, Vec<f32>)>,
}

/// [`StoredPages::choose`]; shapes are checked.
pub(super) fn choose(pages: &StoredPages, q: &Tensor, params: &ChoiceParams<'_>) -> Result<Choice> {
    let (mut first, mut parts) = (0, Vec::new());
    for run in params.runs {
        parts.push(choose_run(pages, &q.narrow(0, first, run.queries)?, run, params)?);
        first += run.queries;
    }
    let rows = |of: fn(&Choice) -> &Option<Tensor>| -> Result<Option<Tensor>> {
        let rows: Vec<&Tensor> = parts.iter().filter_map(|part| of(part).as_ref()).collect();
        (!rows.is_empty()).then(|| Tensor::cat(&rows, 0)).transpose()
    };
    let (marks, best) = (rows(|part| &part.marks)?, rows(|part| &part.best)?);
    let tokens = parts.first().map_or(0, Choice::num_tokens);
    let recovered = parts.iter().find_map(|part| part.recovered.clone());
    let kept = |of: fn(&Standing) -> &Tensor| -> Result<Option<Tensor>> {
        let lists: Vec<&Tensor> =
            parts.iter().filter_map(|part| part.standing.as_ref()).map(of).collect();
        (!lists.is_empty()).then(|| Tensor::cat(&lists, 0)).transpose()
    };
    let kept = (kept(|list| &list.tokens)?, kept(|list| &list.votes)?);
    let standing = kept.0.zip(kept.1).map(|(tokens, votes)| Standing { tokens, votes });
    let pages = parts.iter().map(|part| part.pages).max().unwrap_or(0);
    Ok(Choice { marks, best, runs: parts.len(), pages, tokens, recovered, standing })
}

fn choose_run(
    pages: &StoredPages,
    q: &Tensor,
    run: &ChoiceRun,
    params: &ChoiceParams<'_>,
) -> Result<Choice> {
    let (t, h, d) = q.dims3()?;
    let g = pages.keys.dim(1)?;
    let (group, num_marks) = (h / g, run.pages * MARKS);
    let queries = mean_queries(&q.flatten_all()?.to_vec1()?, (t, h, d), params);
    let of_head = |head: usize| -> Vec<f32> {
        let heads = queries.chunks_exact(h * d);
        heads.flat_map(|query| &query[head * group * d..(head + 1) * group * d]).copied().collect()
    };
    let pins = params.pins.map(Tensor::to_vec1::<u32>).transpose()?.unwrap_or_default();
    let wanted = params.landmarks.map_or(num_marks, |landmarks| landmarks.min(num_marks));
    let landmarks = numbers(&pages.landmarks.narrow(0, pages.first * MARKS, num_marks)?)?;
    let keys = numbers(&pages.keys.narrow(0, pages.first, run.pages)?)?;
    let outliers = match &pages.outliers {
        Some((marks, keys)) => Some((marks.to_vec2::<u32>()?, numbers(keys)?)),
        None => None,
    };
    let standing = standing_of(params.standing, g, pages.gone * PAGE_TOKENS)?;
    let mut heads = Vec::with_capacity(g);
    for (head, standing) in standing.iter().enumerate() {
        let queries = of_head(head);
        let mut missed = None;
        let marks: Vec<u32> = if wanted == num_marks {
            (0..num_marks as u32).collect()
        } else {
            let row = |i: usize, from: &[f32]| from[(i * g + head) * d..][..d].to_vec();
            let mut rows: Vec<f32> = (0..num_marks).flat_map(|i| row(i, &landmarks)).collect();
            let mut owners = Vec::new();
            if let Some((marks, keys)) = &outliers {
                for (i, mark) in marks[head].iter().enumerate() {
                    if (*mark as usize) < num_marks {
                        owners.push(*mark);
                        rows.extend((i * SPAN..(i + 1) * SPAN).flat_map(|i| row(i, keys)));
                    }
                }
            }
            let votes = vote(&queries, &rows, group, d);
            let mut by_mark = votes.keys[..num_marks].to_vec();
            for (mark, keys) in owners.iter().zip(votes.keys[num_marks..].chunks_exact(SPAN)) {
                let vote = &mut by_mark[*mark as usize];
                *vote = keys.iter().copied().fold(*vote, f32::max);
            }
            let pinned = pins.iter().filter(|pin| (**pin as usize) < num_marks);
            // A pinned landmark asks for no other.
            pinned.clone().for_each(|pin| by_mark[*pin as usize] = 0.0);
            let alone = by_mark.clone();
            rows::maximum_within(&alone, params.reach.div_ceil(SPAN), &mut by_mark);
            for (token, vote) in standing {
                if let Some(own) = by_mark.get_mut(*token as usize / SPAN) {
                    *own = own.max(*vote);
                }
            }
            pinned.for_each(|pin| by_mark[*pin as usize] = f32::INFINITY);
            let marks = rows::largest(&by_mark, wanted);
            let taken = marks
                .iter()
                .map(|mark| votes.last.iter().map(|shares| shares[*mark as usize]).sum::<f32>());
            let left = 1.0 - (taken.sum::<f32>() / group as f32).min(1.0);
            missed = Some((left, votes.norms));
            marks
        };
        let mut rows = Vec::with_capacity(marks.len() * SPAN * d);
        for mark in &marks {
            let (page, first) = (*mark as usize / MARKS, *mark as usize % MARKS * SPAN);
            rows.extend_from_slice(
                &keys[((page * g + head) * PAGE_TOKENS + first) * d..][..SPAN * d],
            );
        }
        let votes = vote(&queries, &rows, group, d);
        // A pinned token asks for no other.
        let mut by_token = votes.keys.clone();
        let by_mark = by_token.chunks_exact_mut(SPAN).zip(&marks);
        by_mark.filter(|(_, mark)| pins.contains(mark)).for_each(|(votes, _)| votes.fill(0.0));
        let mut by_token = pooled(&by_token, &marks, params.reach);
        for (token, vote) in standing {
            if let Ok(at) = marks.binary_search(&(token / SPAN as u32)) {
                let own = &mut by_token[at * SPAN + *token as usize % SPAN];
                *own = own.max(*vote);
            }
        }
        for (mark, votes) in marks.iter().zip(by_token.chunks_exact_mut(SPAN)) {
            if pins.contains(mark) {
                votes.fill(f32::INFINITY);
            }
        }
        heads.push(Compared { marks, votes, by_token, missed });
    }
    if params.heads_together {
        let mut sums = vec![0f32; heads.first().map_or(0, |head| head.by_token.len())];
        for head in &heads {
            sums.iter_mut().zip(&head.by_token).for_each(|(sum, vote)| *sum += vote);
        }
        heads.iter_mut().for_each(|head| head.by_token.clone_from(&sums));
    }
    let (mut all_marks, mut all_best, mut recovered) = (Vec::new(), Vec::new(), 0f32);
    let (mut kept_tokens, mut kept_votes) = (Vec::new(), Vec::new());
    for Compared { marks, votes, by_token, missed } in heads {
        let best = rows::largest(&by_token, params.tokens);
        let held =
            best.iter().map(|i| votes.last.iter().map(|shares| shares[*i as usize]).sum::<f32>());
        let held = (held.sum::<f32>() / group as f32).min(1.0);
        let share = match &missed {
            Some((left, norms)) => {
                let shares = norms.iter().zip(&votes.norms);
                let of =
                    |(all, own): (&f32, &f32)| 1.0 / (1.0 + SPAN as f32 * left * (all - own).exp());
                shares.map(of).sum::<f32>() / group as f32
            }
            None => 1.0,
        };
        recovered += held * share / g as f32;
        let gone = (pages.gone * PAGE_TOKENS) as u32;
        let token = |i: &u32| gone + marks[*i as usize / SPAN] * SPAN as u32 + i % SPAN as u32;
        kept_tokens.extend(best.iter().map(token));
        kept_votes.extend(best.iter().map(|i| by_token[*i as usize]));
        all_marks.extend(marks);
        all_best.extend(best);
    }
    let tokens = all_best.len() / g;
    let best = Tensor::from_vec(all_best, (g, tokens), &Device::Cpu)?;
    let marks = (wanted < num_marks)
        .then(|| Tensor::from_vec(all_marks, (g, wanted), &Device::Cpu))
        .transpose()?;
    let recovered = (t == 1).then(|| Tensor::from_vec(vec![recovered], 1, &Device::Cpu));
    let recovered = recovered.transpose()?;
    let standing = match params.keep_votes {
        true => Some(Standing {
            tokens: Tensor::from_vec(kept_tokens, (g, tokens), &Device::Cpu)?,
            votes: Tensor::from_vec(kept_votes, (g, tokens), &Device::Cpu)?,
        }),
        false => None,
    };
    let (best, pages) = (Some(best), run.pages);
    Ok(Choice { marks, best, runs: 1, pages, tokens, recovered, standing })
}

/// By head, the tokens that have standing votes, without the `gone` first ones, and these; nothing for none.
fn standing_of(standing: Option<&Standing>, g: usize, gone: usize) -> Result<Vec<Vec<(u32, f32)>>> {
    let Some(standing) = standing else { return Ok(vec![Vec::new(); g]) };
    let there = |(token, vote): (u32, f32)| Some((token.checked_sub(gone as u32)?, vote));
    let heads = standing.by_head(g)?.into_iter();
    Ok(heads.map(|head| head.into_iter().filter_map(there).collect()).collect())
}

/// The largest of the votes of `marks`' tokens within `reach` of each.
fn pooled(votes: &[f32], marks: &[u32], reach: usize) -> Vec<f32> {
    let token = |i: usize| marks[i / SPAN] as usize * SPAN + i % SPAN;
    let within = |i: usize| {
        let near =
            i.saturating_sub(reach)..i.saturating_add(reach).saturating_add(1).min(votes.len());
        near.filter(move |j| token(*j).abs_diff(token(i)) <= reach)
    };
    (0..votes.len()).map(|i| within(i).map(|j| votes[j]).fold(votes[i], f32::max)).collect()
}

/// Rotated, pooled, scaled: (⌈t / pooled⌉, h, d).
fn mean_queries(
    q: &[f32],
    (t, h, d): (usize, usize, usize),
    params: &ChoiceParams<'_>,
) -> Vec<f32> {
    let mut q = q.to_vec();
    let (cos, sin) = params.angles.at(params.distance);
    q.chunks_exact_mut(d).for_each(|row| rows::rotate_row(row, cos, sin));
    let mut means = Vec::with_capacity(t.div_ceil(params.pooled) * h * d);
    for tokens in q.chunks(params.pooled * h * d) {
        let factor = params.scale / (tokens.len() / (h * d)) as f32;
        let mut mean = vec![0f32; h * d];
        for token in tokens.chunks_exact(h * d) {
            mean.iter_mut().zip(token).for_each(|(m, x)| *m += x * factor);
        }
        means.append(&mut mean);
    }
    means
}

/// `queries` (queries · group, d), `keys` (n, d).
fn vote(queries: &[f32], keys: &[f32], group: usize, d: usize) -> Votes {
    let n = keys.len() / d;
    let mut scores = vec![0f32; queries.len() / d * n];
    rows::score_rows(queries, keys, d, &mut scores, n);
    let mut votes = Votes { keys: vec![0f32; n], last: Vec::new(), norms: Vec::new() };
    for heads in scores.chunks_exact_mut(group * n) {
        let mut sum = vec![0f32; n];
        (votes.last, votes.norms) = (Vec::new(), Vec::new());
        for scores in heads.chunks_exact_mut(n) {
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total = rows::exponentiate(scores, max);
            scores.iter_mut().for_each(|score| *score /= total);
            sum.iter_mut().zip(&*scores).for_each(|(sum, share)| *sum += share);
            votes.norms.push(max + total.ln());
            votes.last.push(scores.to_vec());
        }
        votes.keys.iter_mut().zip(sum).for_each(|(vote, sum)| *vote = vote.max(sum));
    }
    votes
}

/// [`StoredPages::gather`]; positions are checked.
pub(super) fn gather(
    pages: &StoredPages,
    choice: &Choice,
    angles: &RotaryAngles,
    placement: Placement,
) -> Result<(Tensor, Tensor)> {
    let (_, g, _, d) = pages.keys.dims4()?;
    let live = |x: &Tensor| numbers(&x.narrow(0, pages.first, pages.len)?);
    let (keys, values) = (live(&pages.keys)?, live(&pages.values)?);
    let num_pages = choice.tokens.div_ceil(PAGE_TOKENS);
    let shape = (choice.runs * num_pages, g, PAGE_TOKENS, d);
    let mut out_keys = vec![0f32; shape.0 * g * PAGE_TOKENS * d];
    let mut out_values = out_keys.clone();
    for (own, tokens) in choice.tokens(g)?.iter().enumerate() {
        let (run, head) = (own / g, own % g);
        for (i, token) in tokens.iter().enumerate() {
            let row = |page: usize, offset: usize| ((page * g + head) * PAGE_TOKENS + offset) * d;
            let from = row(*token as usize / PAGE_TOKENS, *token as usize % PAGE_TOKENS);
            let to = row(run * num_pages + i / PAGE_TOKENS, i % PAGE_TOKENS);
            out_values[to..to + d].copy_from_slice(&values[from..from + d]);
            let key = &mut out_keys[to..to + d];
            key.copy_from_slice(&keys[from..from + d]);
            let position = match placement {
                Placement::Stream(first) => first + u64::from(*token),
                Placement::Compact(first) => first + i as u64,
            };
            let (cos, sin) = angles.at(position as usize);
            rows::rotate_row(key, cos, sin);
        }
    }
    Ok((
        Tensor::from_vec(out_keys, shape, &Device::Cpu)?,
        Tensor::from_vec(out_values, shape, &Device::Cpu)?,
    ))
}

/// [`super::note_share`]; shapes are checked.
pub(super) fn note_share(
    sums: &Tensor,
    lse: &Tensor,
    all: &Tensor,
    recovered: Option<&Tensor>,
) -> Result<()> {
    let (lse, all) = (numbers(lse)?, numbers(all)?);
    let recovered = recovered.map(numbers).transpose()?.map_or(0.0, |x| x[0]);
    let share = |(own, all): (&f32, &f32)| if all.is_finite() { (own - all).exp() } else { 0.0 };
    let shares = lse.iter().zip(&all).map(share);
    let mut after = numbers(sums)?;
    after.iter_mut().zip(shares.chain([recovered])).for_each(|(sum, x)| *sum += x);
    sums.slice_set(&Tensor::from_vec(after, lse.len() + 1, &Device::Cpu)?, 0, 0)
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
