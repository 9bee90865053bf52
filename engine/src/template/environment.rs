//! The Jinja dialect that chat templates are written in.
//! Knows no message and no token: functions, filters and whitespace rules only.
//!
//! Source: `_compile_jinja_template` in huggingface/transformers, `utils/chat_template_utils.py`.

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind as JinjaKind, Value};
use serde::Serialize;

use super::wrong;
use crate::{Error, Result};

/// The one template in an environment.
pub(super) const NAME: &str = "chat";

/// A calendar day, for templates that print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Date {
    year: i32,
    month: u8,
    day: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// A day of the Gregorian calendar, years 1 to 9999.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) where there is no such day.
    pub(crate) fn new(year: i32, month: u8, day: u8) -> Result<Self> {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = match month {
            2 => 28 + u8::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if !(1..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=days).contains(&day) {
            return Err(Error::invalid(format!("date: no such day {year}-{month}-{day}")));
        }
        Ok(Self { year, month, day })
    }

    /// The day after `strftime`'s format; the time is midnight.
    fn format(self, format: &str) -> Result<String, minijinja::Error> {
        let Self { year, month, day } = self;
        let month_name = MONTHS[usize::from(month) - 1];
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(char) = chars.next() {
            if char != '%' {
                out.push(char);
                continue;
            }
            match chars.next() {
                Some('Y') => out += &format!("{year:04}"),
                Some('y') => out += &format!("{:02}", year % 100),
                Some('m') => out += &format!("{month:02}"),
                Some('d') => out += &format!("{day:02}"),
                Some('B') => out += month_name,
                Some('b' | 'h') => out += &month_name[..3],
                Some('A') => out += self.weekday(),
                Some('a') => out += &self.weekday()[..3],
                Some('F') => out += &format!("{year:04}-{month:02}-{day:02}"),
                Some('H' | 'M' | 'S') => out += "00",
                Some('%') => out.push('%'),
                other => {
                    return Err(minijinja::Error::new(
                        JinjaKind::InvalidOperation,
                        format!("strftime_now: format %{} is not supported", other.unwrap_or(' ')),
                    ));
                }
            }
        }
        Ok(out)
    }

    /// Sakamoto's method.
    fn weekday(self) -> &'static str {
        const SHIFTS: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let month = usize::from(self.month);
        let year = if month < 3 { self.year - 1 } else { self.year };
        let sum = year + year / 4 - year / 100 + year / 400 + SHIFTS[month - 1];
        WEEKDAYS[(sum + i32::from(self.day)).rem_euclid(7) as usize]
    }
}

/// Compiles `source`.
pub(super) fn build(source: &str) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", tojson);
    let source = without_generation_blocks(source);
    environment
        .add_template_owned(NAME, source)
        .map_err(|source| wrong(&source).with_source(source))?;
    Ok(environment)
}

/// Defines `strftime_now`.
pub(super) fn add_date(environment: &mut Environment<'static>, date: Date) {
    environment.add_function("strftime_now", move |format: &str| date.format(format));
}

/// What a template said in refusing a conversation.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(JinjaKind::InvalidOperation, message.clone())
        .with_source(Raised(message)))
}

/// Converts a failure to render: the template's own refusal is the caller's to mend.
pub(super) fn error(source: minijinja::Error) -> Error {
    let mut cause: Option<&dyn std::error::Error> = Some(&source);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return Error::invalid(format!("chat template: refuses the conversation: {message}"));
        }
        cause = current.source();
    }
    wrong(&source).with_source(source)
}

/// `json.dumps(value, ensure_ascii=False)`: no HTML escapes, blanks after commas and colons.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (kwargs.get("ensure_ascii")?, kwargs.get("sort_keys")?, kwargs.get("separators")?);
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) if width <= 16 => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        _ => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter))
        }
    };
    let bad = |text: String| minijinja::Error::new(JinjaKind::BadSerialization, text);
    written.map_err(|source| bad(source.to_string()))?;
    String::from_utf8(out).map_err(|source| bad(source.to_string()))
}

/// JSON with Python's default separators, `", "` and `": "`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` marks a stretch for training masks and renders as if it were not there; a
/// block that is always taken does the same, with the same whitespace.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out += before;
        let Some(length) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let end = length + 2;
        let inner = &tag[2..end];
        let name = inner.trim_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(replacement) => out += &["{%", &inner.replace(name, replacement), "%}"].concat(),
            None => out += &tag[..end + 2],
        }
        rest = &tag[end + 2..];
    }
    out + rest
}
