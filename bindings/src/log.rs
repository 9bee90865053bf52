//! What the library logs, handed to a foreign logger.
//! Knows no logger; spans are not followed, only events.

use crate::error::MkaError;
use crate::foreign;
use std::fmt::{Debug, Write};
use std::sync::{Arc, Once, PoisonError, RwLock};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Level, Metadata, Subscriber};

/// How grave a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, uniffi::Enum)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is not as it should be.
    Warn,
    /// What a user may want to know.
    Info,
    /// What a developer may want to know.
    Debug,
    /// Everything.
    Trace,
}

impl From<&Level> for LogLevel {
    fn from(level: &Level) -> Self {
        match *level {
            Level::ERROR => Self::Error,
            Level::WARN => Self::Warn,
            Level::INFO => Self::Info,
            Level::DEBUG => Self::Debug,
            Level::TRACE => Self::Trace,
        }
    }
}

/// Where messages go; called from threads of the library.
#[uniffi::export(with_foreign)]
pub trait LogSink: Send + Sync {
    /// Takes one message.
    fn log(&self, level: LogLevel, target: String, message: String);
}

/// The sink and the gravest level that it does not want.
type Forwarding = Option<(LogLevel, Arc<dyn LogSink>)>;
static SINK: RwLock<Forwarding> = RwLock::new(None);
static INSTALL: Once = Once::new();

/// Sends messages of `level` and graver to `sink`, in place of the sink before it; without one, to nobody.
///
/// `Locked` if the program has a `tracing` subscriber of its own already.
#[uniffi::export]
pub fn forward_logs(level: LogLevel, sink: Option<Arc<dyn LogSink>>) -> Result<(), MkaError> {
    let mut taken = false;
    INSTALL.call_once(|| taken = tracing::subscriber::set_global_default(Forwarder).is_err());
    if taken {
        return Err(MkaError::Locked(
            "forward_logs: the program has a tracing subscriber already, expected none".into(),
        ));
    }
    *SINK.write().unwrap_or_else(PoisonError::into_inner) = sink.map(|sink| (level, sink));
    Ok(())
}

/// The sink, if it wants messages of `metadata`'s level; the lock is not held while it is called.
fn wanted(metadata: &Metadata<'_>) -> Option<Arc<dyn LogSink>> {
    let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
    let (level, sink) = sink.as_ref()?;
    let ours = metadata.target().starts_with("mka");
    (ours && LogLevel::from(metadata.level()) <= *level).then(|| sink.clone())
}

struct Forwarder;

impl Subscriber for Forwarder {
    // The sink changes while the program runs.
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && wanted(metadata).is_some()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        // Held until the sink is let go, which may call its language too.
        let Some(_call) = foreign::call() else { return };
        let Some(sink) = wanted(event.metadata()) else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let target = event.metadata().target().to_owned();
        sink.log(event.metadata().level().into(), target, text.message + &text.fields);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// A message and its fields as ` name=value`.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
