//! What a foreign caller passes to one call: every field may be left out, and the engine's defaults hold.
//! Knows no default value; the docs repeat the engine's.

use crate::config::RecallPolicy;
use crate::filter::{Filter, MetadataValue, marks};
use crate::grammar::Grammar;
use crate::mirrored::{count, mirrored, set};
use crate::scope::Role;
use std::collections::HashMap;

/// How one message is answered.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct SendOptions {
    /// 0, the default, takes the most likely token; above, logits are divided by it.
    #[uniffi(default)]
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens; 0, the default, keeps all.
    #[uniffi(default)]
    pub top_k: Option<u64>,
    /// Keep the smallest set of tokens whose probability reaches this; 1, the default, keeps all.
    #[uniffi(default)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one; 0, the default, drops none.
    #[uniffi(default)]
    pub min_p: Option<f32>,
    /// Positive logits of recent tokens are divided by this, negative ones multiplied; 1, the default, changes none.
    #[uniffi(default)]
    pub repetition_penalty: Option<f32>,
    /// Two runs with one seed draw the same, and so do two that leave it out: it is 0 then.
    #[uniffi(default)]
    pub seed: Option<u64>,
    /// Most tokens to generate; 512 if left out.
    #[uniffi(default)]
    pub max_new_tokens: Option<u64>,
    /// The answer ends before the first of these.
    #[uniffi(default)]
    pub stop: Vec<String>,
    /// Words that the answer begins with; they are part of the turn but are not streamed.
    #[uniffi(default)]
    pub answer_prefix: Option<String>,
    /// Whether the message is the prompt as it stands, without the chat template.
    #[uniffi(default)]
    pub completion: bool,
    /// Whether the message goes on in the message of the document fed before it.
    #[uniffi(default)]
    pub joined: bool,
    /// Instructions before a session's first message, ignored later; they stay in sight, as far as the trained length has
    /// room.
    #[uniffi(default)]
    pub system: Option<String>,
    /// How older tokens come back; as the engine was opened if left out.
    #[uniffi(default)]
    pub recall: Option<RecallPolicy>,
    /// Memories to look up; as the engine was opened if left out.
    #[uniffi(default)]
    pub recall_k: Option<u64>,
    /// Whether other sessions of the same user, or of the agent if the session has one, are searched too.
    #[uniffi(default)]
    pub across_sessions: bool,
    /// When the message was said, milliseconds since 1970; now if left out.
    #[uniffi(default)]
    pub time_ms: Option<i64>,
    /// What the turns of the message and of its answer are marked with: at most 254 keys, none of which begins with `mka.`.
    #[uniffi(default)]
    pub metadata: HashMap<String, MetadataValue>,
    /// The memories that are looked up are of turns whose metadata this accepts.
    #[uniffi(default)]
    pub recall_filter: Option<Filter>,
    /// Tools that the model may call, each the JSON of a function as OpenAI writes it: the model's chat template lists them
    /// before a session's first message, and refuses them where it lists none; ignored later. They stay in sight as `system`
    /// does.
    #[uniffi(default)]
    pub tools: Vec<String>,
    /// What the answer is held to, from its first token to its last; nothing if left out. One that `max_new_tokens` or a stop
    /// string ends may be a part of what the grammar allows.
    #[uniffi(default)]
    pub grammar: Option<Grammar>,
}

impl From<SendOptions> for mka::SendOptions {
    fn from(from: SendOptions) -> Self {
        let mut sampling = mka::Sampling::default();
        set(&mut sampling.temperature, from.temperature);
        set(&mut sampling.top_k, from.top_k.map(count));
        set(&mut sampling.top_p, from.top_p);
        set(&mut sampling.min_p, from.min_p);
        set(&mut sampling.repetition_penalty, from.repetition_penalty);
        set(&mut sampling.seed, from.seed);
        let mut options = Self::default();
        options.sampling = sampling;
        options.max_new_tokens = from.max_new_tokens.map(count);
        options.stop = from.stop;
        options.answer_prefix = from.answer_prefix.unwrap_or_default();
        options.completion = from.completion;
        options.joined = from.joined;
        options.system = from.system;
        options.recall = from.recall.map(Into::into);
        options.recall_k = from.recall_k.map(count);
        options.across_sessions = from.across_sessions;
        options.time_ms = from.time_ms;
        options.metadata = marks(from.metadata);
        options.recall_filter = from.recall_filter.map(Into::into);
        options.tools = from.tools;
        options.grammar = from.grammar.map(Into::into);
        options
    }
}

mirrored! {
    /// What of a document the model reads.
    pub enum FeedMode for mka::FeedMode {
        /// All of it up to four windows, and in an engine that recalls pages and no text; beyond, as `Text`. The default.
        Auto,
        /// Every token runs through the model.
        Model,
        /// The text is remembered; the model reads its end.
        Text,
    }
}

/// How a document is taken in.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct FeedOptions {
    /// What the model reads; by length if left out.
    #[uniffi(default)]
    pub mode: Option<FeedMode>,
    /// Name of the document, shown beside what is recalled from it.
    #[uniffi(default)]
    pub name: Option<String>,
    /// Whether the text stands outside the chat template.
    #[uniffi(default)]
    pub completion: bool,
    /// When the document was given, milliseconds since 1970; now if left out.
    #[uniffi(default)]
    pub time_ms: Option<i64>,
    /// By what the tokens that the model reads recall older ones; as the engine was opened if left out.
    #[uniffi(default)]
    pub recall: Option<RecallPolicy>,
    /// What the document's turns are marked with: at most 256 keys, none of which begins with `mka.`.
    #[uniffi(default)]
    pub metadata: HashMap<String, MetadataValue>,
    /// Instructions before a session's first message, if the document begins it and the model reads of it; ignored later. A
    /// model's chat template that takes none makes the document an invalid argument.
    #[uniffi(default)]
    pub system: Option<String>,
}

impl From<FeedOptions> for mka::FeedOptions {
    fn from(from: FeedOptions) -> Self {
        let mut options = Self::default();
        set(&mut options.mode, from.mode.map(Into::into));
        options.name = from.name;
        options.completion = from.completion;
        options.time_ms = from.time_ms;
        options.recall = from.recall.map(Into::into);
        options.metadata = marks(from.metadata);
        options.system = from.system;
        options
    }
}

/// How to recall.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct RecallOptions {
    /// The most hits to return; 8 if left out.
    #[uniffi(default)]
    pub k: Option<u64>,
    /// In the scope's own session, only chunks of turns before this one.
    #[uniffi(default)]
    pub before_turn: Option<u64>,
    /// In the scope's own session, no chunks of these turns.
    #[uniffi(default)]
    pub except_turns: Vec<u64>,
    /// Also look into the other sessions of the scope's user, or of the agent if it names one.
    #[uniffi(default)]
    pub across_sessions: bool,
    /// Only turns in these roles; all if empty.
    #[uniffi(default)]
    pub roles: Vec<Role>,
    /// Only turns at this time or later, milliseconds since 1970.
    #[uniffi(default)]
    pub since_ms: Option<i64>,
    /// Only turns before this time, milliseconds since 1970.
    #[uniffi(default)]
    pub until_ms: Option<i64>,
    /// Memory as it was at this time, milliseconds since 1970: later turns are not there yet, and a turn counts as
    /// superseded or expired if it was by then.
    #[uniffi(default)]
    pub as_of_ms: Option<i64>,
    /// The caller's clock, milliseconds since 1970: what expired by then is left out; the system's clock if left out.
    #[uniffi(default)]
    pub now_ms: Option<i64>,
    /// Also return what a newer turn of the same subject superseded.
    #[uniffi(default)]
    pub stale: bool,
    /// Halves a score for every so many milliseconds of age; left out, age counts next to nothing.
    #[uniffi(default)]
    pub half_life_ms: Option<u64>,
    /// Hits that score less are left out; 0, the default, keeps all.
    #[uniffi(default)]
    pub min_score: Option<f32>,
    /// Hits less relevant are left out; 0, the default, keeps all.
    #[uniffi(default)]
    pub min_relevance: Option<f32>,
    /// Only turns whose metadata this accepts.
    #[uniffi(default)]
    pub filter: Option<Filter>,
    /// Let a short question lean on what its session was about just now; true if left out.
    #[uniffi(default)]
    pub follow_up: Option<bool>,
}

impl RecallOptions {
    /// The engine's options, those that are left out as `recall` has them.
    pub(crate) fn over(self, mut recall: mka::Recall) -> mka::Recall {
        set(&mut recall.k, self.k.map(count));
        recall.before_turn = self.before_turn;
        recall.except_turns = self.except_turns;
        recall.across_sessions = self.across_sessions;
        recall.roles = self.roles.into_iter().map(Into::into).collect();
        recall.since_ms = self.since_ms;
        recall.until_ms = self.until_ms;
        recall.as_of_ms = self.as_of_ms;
        recall.now_ms = self.now_ms;
        recall.stale = self.stale;
        recall.half_life_ms = self.half_life_ms;
        set(&mut recall.min_score, self.min_score);
        set(&mut recall.min_relevance, self.min_relevance);
        recall.filter = self.filter.map(Into::into);
        set(&mut recall.follow_up, self.follow_up);
        recall
    }
}

impl From<RecallOptions> for mka::Recall {
    fn from(from: RecallOptions) -> Self {
        from.over(Self::default())
    }
}

/// A turn to be remembered.
#[derive(Debug, Clone, uniffi::Record)]
pub struct NewTurn {
    /// Who produced it.
    pub role: Role,
    /// Its text.
    pub text: String,
    /// When, milliseconds since 1970; 0 is now.
    pub time_ms: i64,
    /// Where the text comes from: a file name, a URL.
    #[uniffi(default)]
    pub source: Option<String>,
    /// Whether it can be recalled later; left out, what a user, the assistant, a document or a tool says can.
    #[uniffi(default)]
    pub remember: Option<bool>,
    /// What it is a fact about: the newest turn of a subject wins.
    #[uniffi(default)]
    pub subject: Option<String>,
    /// When it stops being recalled, milliseconds since 1970.
    #[uniffi(default)]
    pub expires_ms: Option<i64>,
    /// What a recall's filter asks for: at most 256 keys of 1 to 256 bytes.
    #[uniffi(default)]
    pub metadata: HashMap<String, MetadataValue>,
}

impl From<NewTurn> for mka::NewTurn {
    fn from(from: NewTurn) -> Self {
        let mut turn = Self::new(from.role.into(), from.text);
        turn.time_ms = from.time_ms;
        turn.source = from.source;
        set(&mut turn.remember, from.remember);
        turn.subject = from.subject;
        turn.expires_ms = from.expires_ms;
        turn.metadata = marks(from.metadata);
        turn
    }
}

/// What to erase within a scope.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum Forget {
    /// Every turn whose text, source name, subject or metadata contains this text, letter case aside.
    Matching {
        /// The text.
        text: String,
    },
    /// Every turn whose metadata this accepts; a filter that accepts every turn, or none, whatever their metadata, is refused.
    Filter {
        /// The filter.
        filter: Filter,
    },
    /// One turn of the scope's session.
    Turn {
        /// Its number.
        turn: u64,
    },
    /// These turns of the scope's session, one at least.
    Turns {
        /// Their numbers.
        turns: Vec<u64>,
    },
    /// Every turn before a time.
    Before {
        /// Milliseconds since 1970.
        time_ms: i64,
    },
    /// Every turn whose time to be recalled was over at a time.
    Expired {
        /// Milliseconds since 1970.
        time_ms: i64,
    },
    /// The scope's session.
    Session,
    /// Every session of the scope.
    Everything,
}

impl From<Forget> for mka::Forget {
    fn from(forget: Forget) -> Self {
        match forget {
            Forget::Matching { text } => Self::matching(text),
            Forget::Filter { filter } => Self::filter(filter.into()),
            Forget::Turn { turn } => Self::turn(turn),
            Forget::Turns { turns } => Self::turns(turns),
            Forget::Before { time_ms } => Self::before(time_ms),
            Forget::Expired { time_ms } => Self::expired(time_ms),
            Forget::Session => Self::session(),
            Forget::Everything => Self::everything(),
        }
    }
}

#[cfg(test)]
mod tests {
    /// A default that changes is to be changed in the docs of its field.
    #[test]
    fn the_engines_defaults_are_those_that_the_docs_repeat() {
        let sampling = mka::Sampling::default();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.0, 0, 1.0));
        let rest = (sampling.min_p, sampling.repetition_penalty, sampling.seed);
        assert_eq!(rest, (0.0, 1.0, 0));
        let recall = mka::Recall::default();
        assert_eq!((recall.k, recall.min_score, recall.min_relevance), (8, 0.0, 0.0));
        assert!(recall.follow_up && mka::SendOptions::default().max_new_tokens.is_none());
    }
}
