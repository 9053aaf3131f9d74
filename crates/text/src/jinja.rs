//! Jinja as Hugging Face's chat templates expect it, with fuel and a limit on
//! the output.
//!
//! What is not bounded: a template that joins a string to itself over and over
//! can ask for memory faster than fuel runs out. Templates come with a model,
//! which a release signs; they are not taken from requests.

use ashlar_core::clock;
use minijinja::{Environment, Error, ErrorKind, State, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io;

/// Instructions one rendering may take; a message takes about a hundred.
const FUEL: u64 = 5_000_000;
/// Where the time of a rendering is found, so that it does not change within.
pub(crate) const NOW: &str = "__now_ms";
const NAME: &str = "chat";

/// Compiles `source`.
pub(crate) fn compile(source: &str) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |why: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    env.add_function("strftime_now", |state: &State<'_, '_>, format: &str| {
        let now = state.lookup(NOW).and_then(|v| i64::try_from(v).ok());
        strftime(now.unwrap_or(0), format)
    });
    env.add_filter("tojson", tojson);
    env.add_template_owned(NAME, without_generation_tags(source))?;
    Ok(env)
}

/// Renders into at most `limit` bytes; `None` when it would take more.
pub(crate) fn render(
    env: &Environment<'_>,
    context: impl Serialize,
    limit: usize,
) -> Result<Option<String>, Error> {
    let mut out = Bounded {
        bytes: Vec::new(),
        limit,
        full: false,
    };
    let done = env
        .get_template(NAME)?
        .render_captured_to(context, &mut out)
        .map(|_| ());
    if out.full {
        return Ok(None);
    }
    done?;
    // The engine writes whole `str`s.
    Ok(Some(String::from_utf8_lossy(&out.bytes).into_owned()))
}

struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if part.len() > self.limit - self.bytes.len() {
            self.full = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` marks the answer for another trainer's mask; it prints
/// nothing, so a block that always runs takes its place.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        // From behind the `{%`, because `{%}` is not a whole tag.
        let Some(close) = rest[open + 2..].find("%}").map(|i| open + 2 + i) else {
            break;
        };
        let inside = &rest[open + 2..close];
        let replaced = match inside.trim_matches(|c: char| c.is_whitespace() || c == '-') {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..open + 2]);
        match replaced {
            Some(tag) => {
                let dash = |on| if on { "-" } else { "" };
                out.push_str(dash(inside.starts_with('-')));
                out.push_str(&format!(" {tag} "));
                out.push_str(dash(inside.ends_with('-')));
            }
            None => out.push_str(inside),
        }
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: no HTML
/// escapes, and a space after `,` and `:` on one line.
fn tojson(value: &Value, indent: Option<usize>, args: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        None => args.get::<Option<usize>>("indent")?,
        given => given,
    };
    let mut out = Vec::new();
    let done = match indent {
        Some(n) => {
            let indent = " ".repeat(n.min(64));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    };
    done.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("not JSON: {e}")))?;
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// C's `strftime` in UTC for the fields chat templates print.
fn strftime(ms: i64, format: &str) -> Result<String, Error> {
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
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
    // `2026-11-23T16:05:00.000Z`; the year may have more than four digits.
    let stamp = clock::rfc3339(ms);
    let (date, time) = stamp.split_once('T').unwrap_or((&stamp, ""));
    let mut parts = date.rsplitn(3, '-');
    let (day, month, year) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let clock_part = |range| time.get(range).unwrap_or_default();
    let name = month
        .parse()
        .ok()
        .and_then(|m: usize| MONTHS.get(m.wrapping_sub(1)));
    let name = name.copied().unwrap_or_default();
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[ms.div_euclid(86_400_000).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(match chars.next() {
            Some('d') => day,
            Some('m') => month,
            Some('Y') => year,
            Some('y') => &year[year.len().saturating_sub(2)..],
            Some('B') => name,
            Some('b') => name.get(..3).unwrap_or(name),
            Some('A') => weekday,
            Some('a') => &weekday[..3],
            Some('H') => clock_part(0..2),
            Some('M') => clock_part(3..5),
            Some('S') => clock_part(6..8),
            Some('%') => "%",
            other => {
                let why = format!("strftime_now: %{} is not supported", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn run(source: &str) -> Result<Option<String>, Error> {
        let list = [Value::from("é"), Value::from("<b>")];
        let context = context! { list, __now_ms => 951_827_696_123i64, s => " a b " };
        render(&compile(source)?, context, 1000)
    }

    #[test]
    fn python_habits() {
        let ok = |source, want: &str| assert_eq!(run(source).unwrap().unwrap(), want, "{source}");
        ok("{{ s.strip() }}{{ s.strip().startswith('a') }}", "a bTrue");
        ok("{{ list | tojson }}", r#"["é", "<b>"]"#);
        ok(
            "{{ {'a': 1, 'b': [1, 2]} | tojson }}",
            r#"{"a": 1, "b": [1, 2]}"#,
        );
        ok("{{ [1] | tojson(indent=2) }}", "[\n  1\n]");
        ok("{{ [1] | tojson(2) }}", "[\n  1\n]");
        ok(
            "{{ strftime_now('%A %a %d %B %b %m %Y %y %H:%M:%S %%') }}",
            "Tuesday Tue 29 February Feb 02 2000 00 12:34:56 %",
        );
        ok("a{% generation %}b{% endgeneration %}c", "abc");
        ok("a {%- generation -%} b {%- endgeneration -%} c", "abc");
        ok("x\n  {% if true %}\ny\n  {% endif %}\nz", "x\ny\nz");
        ok("{{ missing }}", "");
    }

    #[test]
    fn what_goes_wrong_is_an_error() {
        assert!(compile("{% if %}").is_err());
        assert!(compile("{{").is_err());
        assert!(compile("{%}").is_err());
        let error = run("{{ raise_exception('no tools') }}").unwrap_err();
        assert!(error.to_string().contains("no tools"), "{error}");
        assert!(run("{{ strftime_now('%Q') }}").is_err());
        let spin = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
        assert_eq!(run(spin).unwrap_err().kind(), ErrorKind::OutOfFuel);
        assert_eq!(run("{{ 'x' * 1001 }}").unwrap(), None, "too long");
    }
}
