//! The local subjects: how each comes to know the context, and how it remembers.
//! Knows no sample and no process.

use crate::job::Memory;

/// How a subject comes to know the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    /// With the question, whole, to dense attention over the model's trained length.
    Whole,
    /// With the question, without its middle, to dense attention over the window.
    Cut,
    /// Fed before the question, in a process that has ended since.
    Before(Feeding),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feeding {
    Model,
    /// As text memory unless `--through-model` is given.
    AsAsked,
}

/// A local subject: one row of [`WAYS`].
pub(super) struct Way {
    pub(super) name: &'static str,
    pub(super) given: Given,
    pub(super) memory: Memory,
}

impl Way {
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        WAYS.iter().find(|way| way.name == name)
    }

    /// Whether the context leaves the same in a session for each such subject, if it is read with the window alone. One
    /// that looks text up feeds by itself: a user's text memory is one, so it would find what another was asked.
    pub(super) fn shares_feed(&self) -> bool {
        let looks_up_text = matches!(self.memory, Memory::Text | Memory::Both);
        self.given == Given::Before(Feeding::Model) && !looks_up_text
    }
}

const WAYS: [Way; 9] = [
    Way { name: "full", given: Given::Whole, memory: Memory::Off },
    Way { name: "truncate", given: Given::Cut, memory: Memory::Off },
    // The first page of the stream (64 tokens) and the window: StreamingLLM (arXiv 2309.17453).
    Way { name: "streaming", given: Given::Before(Feeding::Model), memory: Memory::Off },
    Way { name: "mka", given: Given::Before(Feeding::AsAsked), memory: Memory::Text },
    Way { name: "pages", given: Given::Before(Feeding::Model), memory: Memory::Pages },
    Way { name: "both", given: Given::Before(Feeding::Model), memory: Memory::Both },
    // Other systems' rules of choosing over the same pages and the same budget.
    Way { name: "infllm", given: Given::Before(Feeding::Model), memory: Memory::InfLlm },
    Way { name: "quest", given: Given::Before(Feeding::Model), memory: Memory::Quest },
    Way { name: "tokenselect", given: Given::Before(Feeding::Model), memory: Memory::TokenSelect },
];

/// Names of the local subjects.
pub(crate) fn names() -> Vec<&'static str> {
    WAYS.iter().map(|way| way.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_fed_once_for_those_that_choose_and_look_up_no_text() {
        let sharing: Vec<_> = WAYS.iter().filter(|way| way.shares_feed()).collect();
        let names: Vec<_> = sharing.iter().map(|way| way.name).collect();
        assert_eq!(names, ["streaming", "pages", "infllm", "quest", "tokenselect"]);
    }
}
