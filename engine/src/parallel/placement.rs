//! Which part of a tensor a process holds where several share one model: a table by name.
//! Knows no process and no value.

/// The name of the learned rates.
pub(crate) const RATES: &str = "rates.logit";

/// Where a tensor lies, and what its gradient on one process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// On every process, with the whole gradient on each.
    Whole,
    /// On every process, each with the part of the gradient that its own heads or columns give.
    Shared,
    /// In equal parts along this dimension.
    Split(usize),
}

impl Placement {
    /// Of the tensor `name`, as checkpoints call it.
    ///
    /// Query, key and value heads and the columns of the MLP's inner width are split: rows of what makes them, columns of
    /// what reads them. An adapter's matrix on the narrow side is shared: each process sees it through its own part.
    pub(crate) fn of(name: &str) -> Self {
        if name == RATES {
            return Self::Shared;
        }
        let layers = name.strip_prefix("model.").unwrap_or(name).strip_prefix("layers.");
        let Some((_, place)) = layers.and_then(|rest| rest.split_once('.')) else {
            return Self::Whole;
        };
        match place.rsplit_once('.').unwrap_or(("", place)) {
            ("self_attn.o_proj" | "mlp.down_proj", "weight") => Self::Split(1),
            ("self_attn.o_proj" | "mlp.down_proj", _) => Self::Whole,
            (projection, _) if projection.ends_with("_proj") => Self::Split(0),
            ("self_attn.q_norm" | "self_attn.k_norm", _) => Self::Shared,
            ("lora.o" | "lora.down", "a") => Self::Split(1),
            ("lora.o" | "lora.down", _) => Self::Shared,
            (adapter, "b") if adapter.starts_with("lora.") => Self::Split(0),
            (adapter, _) if adapter.starts_with("lora.") => Self::Shared,
            // The router's first matrix reads the queries of all heads: each process has the columns of its own.
            ("router.down", "weight") => Self::Split(1),
            ("", "gate") => Self::Shared,
            _ => Self::Whole,
        }
    }

    /// The dimension that is split; none for what every process holds.
    pub(crate) fn split(self) -> Option<usize> {
        match self {
            Self::Split(dim) => Some(dim),
            Self::Whole | Self::Shared => None,
        }
    }
}
