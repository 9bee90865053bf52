//! JSON as a template's filter `tojson` writes it in transformers: Python's `json.dumps`, letters beyond ASCII as they are.
//! Knows no template and no tool.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use std::fmt::Write;

/// How deep values may nest: more than JSON from outside does (128, by its reader), and less than a stack holds of what a
/// template may build.
const MAX_DEPTH: usize = 200;

/// The filter: `value | tojson(indent=4)`. `ensure_ascii`, `separators` and `sort_keys` are Python's.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    args: Kwargs,
) -> Result<String, Error> {
    let named: Option<bool> = args.get("ensure_ascii")?;
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let sort_keys: Option<bool> = args.get("sort_keys")?;
    args.assert_all_used()?;
    let [item, key] = match separators.as_deref() {
        // An item stands at the end of its line where each has one.
        None if indent.is_some() => [",", ": "],
        None => [", ", ": "],
        Some([item, key]) => [item.as_str(), key.as_str()],
        Some(others) => {
            let what = format!("tojson: {} separators, expected two", others.len());
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    };
    let mut writer = Writer {
        out: String::new(),
        is_ascii: ensure_ascii.or(named).unwrap_or(false),
        sorts_keys: sort_keys.unwrap_or(false),
        indent,
        item,
        key,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// `value` in one line, as `tojson` writes it by default.
pub(super) fn line(value: &Value) -> Result<String, Error> {
    tojson(value, None, Kwargs::from_iter(std::iter::empty::<(String, Value)>()))
}

/// What stands between the quotation marks of `text` as a string of JSON.
pub(crate) fn inside(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape(&mut out, text, false);
    out
}

struct Writer<'a> {
    out: String,
    is_ascii: bool,
    sorts_keys: bool,
    indent: Option<usize>,
    /// Between two items, and between a key and its value.
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let what = format!("tojson: a value nests deeper than {MAX_DEPTH}");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group(['[', ']'], items.len(), depth, |writer, i| {
                    writer.value(&items[i], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((name(&key)?, value.get_item(&key)?));
                }
                if self.sorts_keys {
                    entries.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                self.group(['{', '}'], entries.len(), depth, |writer, i| {
                    let (key, value) = &entries[i];
                    writer.string(key);
                    writer.out.push_str(writer.key);
                    writer.value(value, depth + 1)
                })?;
            }
            _ => self.out.push_str(&plain(value)?),
        }
        Ok(())
    }

    /// `len` things between two brackets, each written by `write`.
    fn group(
        &mut self,
        [open, close]: [char; 2],
        len: usize,
        depth: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..len {
            if i > 0 {
                self.out.push_str(self.item);
            }
            self.line(depth + 1);
            write(self, i)?;
        }
        if len > 0 {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// Begins a line of its own, if there are any.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent.saturating_mul(depth).min(1 << 16)));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        escape(&mut self.out, text, self.is_ascii);
        self.out.push('"');
    }
}

/// A key of a map, which Python makes a text.
fn name(key: &Value) -> Result<String, Error> {
    match key.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => plain(key),
    }
}

/// What is neither text nor a group.
fn plain(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(value.is_true().to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(float(f64::try_from(value.clone())?)),
        kind => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is not for JSON")))
        }
    }
}

/// A number as Python's `repr` has it: the fewest digits that read back as the same one.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    let sign = if number.is_sign_negative() { "-" } else { "" };
    if number.is_infinite() {
        return format!("{sign}Infinity");
    }
    let scientific = format!("{:e}", number.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((scientific.as_str(), "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let digits = mantissa.replace('.', "");
    let zeros = |count: i32| "0".repeat(count.max(0) as usize);
    let len = digits.len() as i32;
    match exponent {
        -4..0 => format!("{sign}0.{}{digits}", zeros(-exponent - 1)),
        0..16 if len <= exponent + 1 => format!("{sign}{digits}{}.0", zeros(exponent + 1 - len)),
        0..16 => {
            let (whole, part) = digits.split_at(exponent as usize + 1);
            format!("{sign}{whole}.{part}")
        }
        _ => {
            let (first, rest) = digits.split_at(1);
            let point = if rest.is_empty() { "" } else { "." };
            format!("{sign}{first}{point}{rest}e{exponent:+03}")
        }
    }
}

fn escape(out: &mut String, text: &str, is_ascii: bool) {
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            char if char < ' ' || (is_ascii && !(' '..='~').contains(&char)) => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            char => out.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::{Environment, context};

    /// `source` over `value`, which is JSON.
    fn render(source: &str, value: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        let value: Value = serde_json::from_str(value).unwrap();
        environment.render_str(source, context! { value }).unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        // Each is what `json.dumps(json.loads(value), ensure_ascii=False)` gives in CPython 3.11.
        for (value, expected) in [
            (r#"{"b":1,"a":[true,null,"x"],"":{}}"#, r#"{"b": 1, "a": [true, null, "x"], "": {}}"#),
            ("[]", "[]"),
            (r#"["<a href='x'>&</a>"]"#, r#"["<a href='x'>&</a>"]"#),
            (r#"["é 漢 😀"]"#, r#"["é 漢 😀"]"#),
            (
                r#""\u0007 \u007f \"q\" \\ \/ \b\f\n\r\t""#,
                "\"\\u0007 \u{7f} \\\"q\\\" \\\\ / \\b\\f\\n\\r\\t\"",
            ),
            ("[1.0, 1.5, -0.0, 0.1, 123456.789]", "[1.0, 1.5, -0.0, 0.1, 123456.789]"),
            ("[1e3, 1e15, 1e16, 1e300]", "[1000.0, 1000000000000000.0, 1e+16, 1e+300]"),
            ("[0.0001, 0.00001, 1.25e-7]", "[0.0001, 1e-05, 1.25e-07]"),
            ("[-3, 18446744073709551615]", "[-3, 18446744073709551615]"),
        ] {
            assert_eq!(render("{{ value | tojson }}", value), expected);
        }
    }

    #[test]
    fn lines_and_letters_are_as_the_arguments_say() {
        let value = r#"{"b": [1, {"c": []}], "a": "é😀"}"#;
        // `json.dumps(value, ensure_ascii=False, indent=2)`, and so on.
        let lines =
            "{\n  \"b\": [\n    1,\n    {\n      \"c\": []\n    }\n  ],\n  \"a\": \"é😀\"\n}";
        assert_eq!(render("{{ value | tojson(indent=2) }}", value), lines);
        assert_eq!(render("{{ value | tojson(indent=none) }}", "[1, 2]"), "[1, 2]");
        assert_eq!(render("{{ value | tojson(indent=0) }}", "[1, 2]"), "[\n1,\n2\n]");
        let sorted = r#"{"a":"\u00e9\ud83d\ude00","b":[1,{"c":[]}]}"#;
        let call = "{{ value | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}";
        assert_eq!(render(call, value), sorted);
        assert_eq!(render("{{ value | tojson(true) }}", r#""é""#), r#""\u00e9""#);
        assert_eq!(render("{{ 'x' + (value | tojson) }}", "[1]"), "x[1]");
    }

    #[test]
    fn what_is_no_json_is_an_error() {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        for source in [
            "{{ missing | tojson }}",
            "{{ [1] | tojson(separators=[',']) }}",
            "{{ [1] | tojson(colour=1) }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        ] {
            assert!(environment.render_str(source, context! {}).is_err(), "{source}");
        }
        assert_eq!(inside("a\"b\n"), "a\\\"b\\n");
        assert_eq!(line(&Value::from(vec![1, 2])).unwrap(), "[1, 2]");
    }
}
