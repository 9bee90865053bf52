//! Export and import of the log as lines of JSON, readable without this library.
//! Knows no bytes of the store's own format; chunks and vectors are made anew where the log is imported.

use std::collections::hash_map::Entry as Told;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufRead, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::commit::Entry;
use super::fork::{Said, said};
use super::read::{OpenBlob, open, read_body};
use super::{Store, partial};
use crate::format::{Body, TurnRecord};
use crate::{Cancel, Error, ErrorKind, NewTurn, Result, Role, Scope, TurnId, Value};

/// What the first line says about the others.
const FORMAT: &str = "mka-memory log";
/// Version of the lines. Those of version 1 have no `order`.
const VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;
/// Turns of one session that are committed at once, and bytes of their text: bounds memory and the number of syncs.
const BATCH_TURNS: usize = 64;
const BATCH_BYTES: usize = 1 << 20;
/// Places among the turns of a user are below this, whatever a line says: others come after them.
const MAX_ORDER: u64 = 1 << 63;
/// The longest line that is read: a turn of some hundred megabytes, escaped.
const MAX_LINE_BYTES: u64 = 1 << 30;

/// What an export wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exported {
    /// Sessions.
    pub sessions: usize,
    /// Lines, the first one aside: one for each turn, retracted, forgotten and damaged ones included.
    pub turns: u64,
    /// Turns that are damaged: they are written as forgotten ones. One text each.
    pub lost: Vec<String>,
}

/// What an import did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// Turns appended.
    pub turns: u64,
    /// Turns that the store held already.
    pub skipped: u64,
    /// Chunks that were new.
    pub chunks_added: usize,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
}

/// One turn. Fields that are left out have the value of most turns.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    user: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    session: String,
    turn: TurnId,
    role: Role,
    time_ms: i64,
    /// Its place among all turns of its user, in the store that it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    order: Option<u64>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    text: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tokens: Vec<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_ms: Option<i64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, Mark>,
    remember: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    retracted: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    forgotten: bool,
    /// The session that the turn was told to, where this one got it by a fork.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    copy_of: Option<String>,
}

/// A value of metadata. The reader of JSON rounds some numbers with many digits: those are written as texts.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Mark {
    Plain(Value),
    Exact { number: String },
}

impl From<Value> for Mark {
    fn from(value: Value) -> Self {
        let read_back = |number: &f64| -> Option<f64> {
            serde_json::from_str(&serde_json::to_string(number).ok()?).ok()
        };
        match value {
            Value::Number(number) if read_back(&number) != Some(number) => {
                Self::Exact { number: number.to_string() }
            }
            value => Self::Plain(value),
        }
    }
}

impl Mark {
    fn into_value(self) -> Result<Value> {
        match self {
            Self::Plain(value) => Ok(value),
            Self::Exact { number } => number.parse().map(Value::Number).map_err(|source| {
                Error::invalid(format!("import: expected a number of metadata, got `{number}`"))
                    .with_source(source)
            }),
        }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A turn as it stood when the export began.
struct Listed {
    turn: TurnId,
    /// None if its record is damaged.
    record: Option<(TurnRecord, Option<Result<OpenBlob>>)>,
    /// The session that it was told to, if this one was forked from it.
    copy_of: Option<String>,
}

/// Turns of one session to be appended, and where each is to go among all turns of the user.
#[derive(Default)]
struct Batch {
    turns: Vec<(NewTurn, Entry)>,
    wanted: Vec<Wanted>,
}

/// How far an import has come.
#[derive(Default)]
struct Import {
    /// Turns that wait, and the session that they are appended to.
    batch: Option<(Scope, Batch)>,
    /// By user.
    orders: HashMap<String, Orders>,
    imported: Imported,
}

/// Where a turn is to go among all turns of its user.
enum Wanted {
    /// Where the original is that it is a copy of.
    Original(u64),
    /// Where it stood beside the others of the import, if that is known.
    Line(Option<u64>),
}

/// Where the turns of one user that an import brings go among all of the user's.
struct Orders {
    /// What is added to the orders of lines; none before the first of them.
    base: Option<u64>,
    /// The order behind all turns that are there: the store's own, unless somebody else has written since.
    next: u64,
    /// Orders that turns have. A forgotten one may share its own: nothing tells a copy of it from another one.
    taken: HashSet<u64>,
}

impl Orders {
    /// A turn of the import is there already, at `held`: the others go where they stood beside it.
    fn hold(&mut self, held: u64, order: Option<u64>) {
        self.base = self.base.or(order.and_then(|order| held.checked_sub(order)));
    }

    /// The order of a turn that is appended; none puts it behind all others.
    fn place(&mut self, wanted: &Wanted, forgotten: bool) -> Option<u64> {
        let placed = match *wanted {
            Wanted::Original(order) => Some(order),
            Wanted::Line(order) => {
                let wanted = order.and_then(|order| {
                    let base = *self.base.get_or_insert(self.next);
                    base.checked_add(order).filter(|order| *order < MAX_ORDER)
                });
                wanted.filter(|order| forgotten || self.taken.insert(*order))
            }
        };
        if placed.is_none() && !forgotten {
            self.taken.insert(self.next);
        }
        self.next = self.next.max(placed.unwrap_or(self.next) + 1);
        placed
    }
}

impl Store {
    /// Writes the log of `scope` to `out`: one line of JSON for each turn, in order, session by session, older ones first.
    ///
    /// It is the log as it stood when the call began, whatever is written or forgotten meanwhile.
    /// Snapshots and pages are not in it: they belong to one model, and a [`backup`](Self::backup) has them.
    ///
    /// # Errors
    /// `Storage` if `out` fails; `Cancelled`.
    pub fn export(&self, scope: &Scope, out: &mut dyn Write, cancel: &Cancel) -> Result<Exported> {
        scope.check("export")?;
        self.export_where(|session| scope.contains(session), out, cancel)
    }

    /// [`Store::export`] of every user: for the owner of the store, not for one of its users.
    ///
    /// # Errors
    /// As [`Store::export`].
    pub fn export_all(&self, out: &mut dyn Write, cancel: &Cancel) -> Result<Exported> {
        self.export_where(|_| true, out, cancel)
    }

    fn export_where(
        &self,
        wanted: impl Fn(&Scope) -> bool,
        out: &mut dyn Write,
        cancel: &Cancel,
    ) -> Result<Exported> {
        let sessions = self.list(wanted);
        let mut exported = Exported { sessions: sessions.len(), ..Exported::default() };
        write_line(out, &Header { format: FORMAT.into(), version: VERSION })?;
        for (scope, turns) in sessions {
            for listed in turns {
                cancel.check("export")?;
                write_line(out, &line(&scope, listed, &mut exported.lost))?;
                exported.turns += 1;
            }
        }
        out.flush().map_err(failed_to_write)?;
        Ok(exported)
    }

    /// The wanted sessions and their turns, with the files that hold them kept open.
    fn list(&self, wanted: impl Fn(&Scope) -> bool) -> Vec<(Scope, Vec<Listed>)> {
        let state = self.read();
        // In the order in which they were made: the original of a copy comes before it.
        let sessions = state.sessions.values();
        let sessions = sessions.filter_map(|session| Some((session.scope.as_ref()?, session)));
        let mut told: HashMap<(&str, Said), &str> = HashMap::new();
        let mut listed = Vec::new();
        for (scope, session) in sessions.filter(|(scope, _)| wanted(scope)) {
            let own = scope.session_id().unwrap_or_default();
            let list = |turn: TurnId| {
                let record = session.turns.get(&turn).map(|turn| turn.record);
                let said = record.and_then(|record| said(turn, &record));
                let copy_of = said.and_then(|said| match told.entry((scope.user_id(), said)) {
                    Told::Occupied(told) => Some((*told.get()).to_owned()),
                    Told::Vacant(first) => {
                        first.insert(own);
                        None
                    }
                });
                let body =
                    |record: TurnRecord| (record, record.body.map(|blob| open(&state, blob)));
                Listed { turn, record: record.map(body), copy_of }
            };
            listed.push((scope.clone(), (0..session.num_turns).map(list).collect()));
        }
        listed
    }

    /// Appends the turns that an export wrote, to the sessions that they come from. What a session got by a
    /// [`fork`](Self::fork) belongs to the original as before, if that one is there by then.
    ///
    /// Turns that the store holds already are skipped, so that an import that was interrupted can be repeated. The others
    /// keep their order among each other, across sessions, behind what the store holds of their user.
    /// Turns are cut, embedded and compared with what is there as new ones are; [`Hygiene`](crate::Hygiene)'s policies
    /// for secrets and personal data do not apply to them.
    ///
    /// # Errors
    /// `InvalidArgument` for a line that is none of an export, or that does not continue its session: the text has the
    /// number of the line; `Cancelled`, and what [`Store::commit`] reports. Turns of lines before are stored.
    pub fn import(&self, input: &mut dyn BufRead, cancel: &Cancel) -> Result<Imported> {
        let mut lines = Lines { input, number: 0 };
        let header: Header =
            lines.next()?.ok_or_else(|| Error::invalid("import: the input is empty"))?;
        if header.format != FORMAT || !(OLDEST_VERSION..=VERSION).contains(&header.version) {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "import: expected `{FORMAT}` of version {OLDEST_VERSION} to {VERSION}, got `{}` of version {}",
                    header.format, header.version
                ),
            ));
        }
        let mut import = Import::default();
        let read = self.import_lines(&mut lines, &mut import, cancel);
        // What was read before a line that is refused is stored all the same; that line is what the caller is told about.
        let flushed = self.import_batch(&mut import);
        read.and(flushed)?;
        Ok(import.imported)
    }

    /// Appends turns line by line; the last batch waits.
    fn import_lines(
        &self,
        lines: &mut Lines<'_>,
        import: &mut Import,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut bytes = 0;
        while let Some(line) = lines.next::<Line>()? {
            cancel.check("import")?;
            let (scope, turn) = (line.scope(), line.turn);
            let waiting = import.batch.as_ref();
            let is_full = bytes > BATCH_BYTES
                || waiting.is_some_and(|(_, batch)| batch.turns.len() == BATCH_TURNS);
            if is_full || waiting.is_some_and(|(known, _)| *known != scope) {
                self.import_batch(import)?;
                bytes = 0;
            }
            let waiting = import.batch.as_ref();
            let num_waiting = waiting.map_or(0, |(_, batch)| batch.turns.len() as u64);
            let next = self.num_turns(&scope)? + num_waiting;
            if turn < next {
                self.check_held(&scope, &line, lines.number)?;
                if let Some(held) = self.order_held(&scope, turn) {
                    self.orders_in(&mut import.orders, &line.user).hold(held, line.order);
                }
                import.imported.skipped += 1;
                continue;
            }
            if turn > next {
                return Err(Error::invalid(format!(
                    "import: line {}: expected turn {next} of {scope}, got {turn}",
                    lines.number
                )));
            }
            bytes += line.text.len();
            let original = line.copy_of.as_ref().map(|session| scope.clone().session(session));
            let wanted = original
                .and_then(|scope| self.order_of(&scope, turn, line.time_ms, line.role))
                .map_or(Wanted::Line(line.order), Wanted::Original);
            let new = line.into_turn()?;
            let (_, batch) = import.batch.get_or_insert_with(|| (scope, Batch::default()));
            batch.turns.push(new);
            batch.wanted.push(wanted);
        }
        Ok(())
    }

    /// [`Store::export`] of `scope`, or of every user if it is none, into a file, which is on the disk when this returns; an
    /// existing one is replaced. Until then it is beside it, as `NAME.PROCESS-NUMBER.partial`; what processes that died left
    /// under such a name of it is removed.
    ///
    /// # Errors
    /// As [`Store::export`]; after one the file that was there is untouched.
    pub fn export_file(
        &self,
        scope: Option<&Scope>,
        path: &Path,
        cancel: &Cancel,
    ) -> Result<Exported> {
        let (partial, file) = &partial::beside(path, |partial| {
            let file = std::fs::OpenOptions::new().write(true).create_new(true).open(partial)?;
            // Says that somebody writes it. A file system without locks needs none: nobody removes what cannot be locked.
            let _ = file.try_lock();
            Ok(file)
        })?;
        let mut out = std::io::BufWriter::new(file);
        let exported = match scope {
            Some(scope) => self.export(scope, &mut out, cancel),
            None => self.export_all(&mut out, cancel),
        };
        drop(out);
        let finished = exported.and_then(|exported| {
            file.sync_all().map_err(|source| Error::io("sync", partial, source))?;
            std::fs::rename(partial, path)
                .map_err(|source| Error::io("rename", partial, source))?;
            super::segment::sync_folder(partial::folder_of(path))?;
            Ok(exported)
        });
        if finished.is_err() {
            // What is left of it is of no use.
            let _ = std::fs::remove_file(partial);
        }
        finished
    }

    /// What an import needs to know of a user's turns.
    fn orders(&self, user: &str) -> Orders {
        let (state, user) = (self.read(), Scope::user(user));
        let sessions = state.sessions_in(&user).map(|(_, _, session)| session);
        let records = sessions.flat_map(|session| session.turns.values()).map(|turn| turn.record);
        let taken = records.filter(|it| it.body.is_some()).map(|it| it.order).collect();
        Orders { base: None, next: state.next_order(user.user_id()), taken }
    }

    fn order_held(&self, scope: &Scope, turn: TurnId) -> Option<u64> {
        let state = self.read();
        Some(state.session(scope)?.1.turns.get(&turn)?.record.order)
    }

    fn orders_in<'a>(&self, orders: &'a mut HashMap<String, Orders>, user: &str) -> &'a mut Orders {
        orders.entry(user.to_owned()).or_insert_with(|| self.orders(user))
    }

    /// Appends the turns that wait.
    fn import_batch(&self, import: &mut Import) -> Result<()> {
        let Some((scope, Batch { turns, wanted })) = import.batch.take() else { return Ok(()) };
        let orders = self.orders_in(&mut import.orders, scope.user_id());
        let done = self.append_log(&scope, &turns, || {
            // Somebody else may have written since: an order is given once.
            if self.read().next_order(scope.user_id()) != orders.next {
                *orders = Orders { base: orders.base, ..self.orders(scope.user_id()) };
            }
            let turns = turns.iter().zip(&wanted);
            turns
                .map(|((_, entry), wanted)| orders.place(wanted, *entry == Entry::Forgotten))
                .collect()
        })?;
        import.imported.turns += done.turns.len() as u64;
        import.imported.chunks_added += done.chunks_added;
        Ok(())
    }

    /// Refuses a line whose turn the store holds with another text.
    fn check_held(&self, scope: &Scope, line: &Line, number: u64) -> Result<()> {
        let held = self.turns(scope, line.turn..line.turn + 1)?;
        let same = held.iter().any(|turn| {
            turn.forgotten || line.forgotten || (turn.text == line.text && turn.role == line.role)
        });
        if same {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "import: line {number}: expected turn {} of {scope} as the store holds it, got another text",
            line.turn
        )))
    }
}

fn line(scope: &Scope, listed: Listed, lost: &mut Vec<String>) -> Line {
    let Listed { turn: id, record: listed, copy_of } = listed;
    let record = listed.as_ref().map(|(record, _)| *record);
    let body: Option<Result<Body>> = match listed {
        None => Some(Err(Error::corrupted(format!(
            "turn {id} of {scope} is lost: its record is damaged"
        )))),
        Some((_, blob)) => blob.map(|blob| read_body(scope, id, blob?)),
    };
    let body = body.and_then(|body| body.map_err(|error| lost.push(error.to_string())).ok());
    let mut line = Line {
        user: scope.user_id().to_owned(),
        agent: scope.agent_id().map(str::to_owned),
        session: scope.session_id().unwrap_or_default().to_owned(),
        turn: id,
        role: record.map_or(Role::System, |record| record.role),
        time_ms: record.map_or(0, |record| record.time_ms),
        order: record.map(|record| record.order),
        text: String::new(),
        tokens: Vec::new(),
        source: None,
        subject: None,
        expires_ms: None,
        metadata: BTreeMap::new(),
        remember: record.is_some_and(|record| record.remember),
        retracted: record.is_some_and(|record| record.retracted),
        forgotten: true,
        copy_of: None,
    };
    if let Some(body) = body {
        (line.text, line.tokens, line.source) = (body.text, body.tokens, body.source);
        (line.subject, line.expires_ms, line.forgotten) = (body.subject, body.expires_ms, false);
        line.copy_of = copy_of;
        let marks = body.metadata.into_iter();
        line.metadata = marks.map(|(key, value)| (key, value.into())).collect();
    }
    line
}

impl Line {
    fn scope(&self) -> Scope {
        let scope = Scope::user(&self.user).session(&self.session);
        match &self.agent {
            Some(agent) => scope.agent(agent),
            None => scope,
        }
    }

    fn into_turn(self) -> Result<(NewTurn, Entry)> {
        let entry = match (self.forgotten, self.retracted) {
            (true, _) => Entry::Forgotten,
            (false, true) => Entry::Retracted,
            (false, false) => Entry::New,
        };
        let mut turn = NewTurn::new(self.role, self.text);
        (turn.time_ms, turn.tokens, turn.source) = (self.time_ms, self.tokens, self.source);
        (turn.remember, turn.subject, turn.expires_ms) =
            (self.remember, self.subject, self.expires_ms);
        let marks = self.metadata.into_iter();
        turn.metadata =
            marks.map(|(key, mark)| Ok((key, mark.into_value()?))).collect::<Result<_>>()?;
        Ok((turn, entry))
    }
}

/// The lines of an import, with their numbers.
struct Lines<'a> {
    input: &'a mut dyn BufRead,
    number: u64,
}

impl Lines<'_> {
    /// The next line that is not blank.
    fn next<T: for<'de> Deserialize<'de>>(&mut self) -> Result<Option<T>> {
        let mut text = String::new();
        loop {
            text.clear();
            self.number += 1;
            let number = self.number;
            let read =
                (&mut *self.input).take(MAX_LINE_BYTES).read_line(&mut text).map_err(|source| {
                    let kind = match source.kind() {
                        // It is no UTF-8.
                        std::io::ErrorKind::InvalidData => ErrorKind::InvalidArgument,
                        _ => ErrorKind::Storage,
                    };
                    Error::new(kind, format!("import: line {number}: {source}")).with_source(source)
                })?;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 == MAX_LINE_BYTES {
                return Err(Error::invalid(format!(
                    "import: line {number}: expected at most {MAX_LINE_BYTES} bytes"
                )));
            }
            if !text.trim().is_empty() {
                return serde_json::from_str(&text).map(Some).map_err(|source| {
                    Error::invalid(format!("import: line {number}: {source}")).with_source(source)
                });
            }
        }
    }
}

fn write_line(out: &mut dyn Write, line: &impl Serialize) -> Result<()> {
    serde_json::to_writer(&mut *out, line)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .map_err(failed_to_write)
}

fn failed_to_write(source: std::io::Error) -> Error {
    Error::new(ErrorKind::Storage, format!("export: {source}")).with_source(source)
}
