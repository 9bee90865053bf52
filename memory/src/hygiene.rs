//! What is worth keeping: texts that say the same again, secrets, personal data.
//! Knows no store: text in, verdicts out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, NewTurn, Result, Role};

/// What is not stored twice, and what is not stored at all.
///
/// ```
/// use mka_memory::{Hygiene, Policy};
///
/// let hygiene = Hygiene::default().secrets(Policy::Refuse).personal(Policy::Withhold);
/// assert!(hygiene.near_duplicates);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hygiene {
    /// Counts a chunk with the words of one that the session holds instead of storing it: the same words in the same
    /// order, where letter case, punctuation at a word's ends, white space, quote marks of lines and the articles
    /// `a`, `an`, `the` do not count. What could change a fact does: a number with its sign, its point and its unit, a
    /// negation, a question mark, a capital letter that is a name, as in `plan A`.
    /// A chunk with the very same text is never stored twice, whatever is chosen here.
    pub near_duplicates: bool,
    /// What to do with passwords, keys and tokens.
    pub secrets: Policy,
    /// What to do with addresses of mail, phone, card, account and social security numbers.
    pub personal: Policy,
}

impl Default for Hygiene {
    /// Near duplicates are counted; secrets and personal data are flagged.
    fn default() -> Self {
        Self { near_duplicates: true, secrets: Policy::Flag, personal: Policy::Flag }
    }
}

impl Hygiene {
    /// Says whether near duplicates are counted instead of stored.
    #[must_use]
    pub fn near_duplicates(mut self, are_counted: bool) -> Self {
        self.near_duplicates = are_counted;
        self
    }

    /// Does with passwords, keys and tokens what `policy` says.
    #[must_use]
    pub fn secrets(mut self, policy: Policy) -> Self {
        self.secrets = policy;
        self
    }

    /// Does with personal data what `policy` says.
    #[must_use]
    pub fn personal(mut self, policy: Policy) -> Self {
        self.personal = policy;
        self
    }
}

/// What to do with a turn that holds something sensitive.
/// Turns of [`Role::Recalled`] are not looked at: they repeat what was looked at before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Policy {
    /// Nothing; it is not looked for.
    Ignore,
    /// It is stored, and named in [`Committed::findings`](crate::Committed::findings).
    #[default]
    Flag,
    /// It stands in the log, is named, and is never recalled.
    Withhold,
    /// The commit is refused as `InvalidArgument`; nothing of it is stored.
    Refuse,
}

/// A kind of sensitive text, by its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Sensitive {
    /// A private key in PEM form.
    PrivateKey,
    /// A token of a known service, or a JSON web token.
    Token,
    /// A password, secret or key after a word that says so.
    Password,
    /// A payment card's number: 13 to 19 digits with a valid check digit.
    Card,
    /// An international bank account number with valid check digits.
    BankAccount,
    /// A United States social security number.
    SocialSecurity,
    /// An address of mail.
    Email,
    /// A phone number with its international prefix.
    Phone,
}

impl Sensitive {
    /// Whether it opens something; else it is personal data.
    pub fn is_secret(self) -> bool {
        matches!(self, Self::PrivateKey | Self::Token | Self::Password)
    }
}

/// Something in a turn that looks sensitive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Finding {
    /// Which of the commit's turns, from 0.
    pub turn: usize,
    /// What it looks like.
    pub kind: Sensitive,
    /// Where it stands in the turn's text.
    pub bytes: Range<usize>,
}

/// The forms, each with what it is. The first group is the sensitive part.
static FORMS: LazyLock<Vec<(Sensitive, Regex)>> = LazyLock::new(|| {
    let forms = [
        (
            Sensitive::PrivateKey,
            r"(-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:[^-]*-----END (?:[A-Z]+ )*PRIVATE KEY-----)?)",
        ),
        // AWS, GitHub, GitLab, Slack, Stripe, Google, OpenAI and Anthropic, npm, PyPI, HuggingFace, Telegram.
        (
            Sensitive::Token,
            r"\b((?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{36,}|github_pat_[0-9A-Za-z_]{22,}|glpat-[0-9A-Za-z_-]{20,}|xox[abeoprs]-[0-9A-Za-z-]{10,}|[rs]k_live_[0-9A-Za-z]{16,}|AIza[0-9A-Za-z_-]{35}|sk-[0-9A-Za-z_-]{20,}|npm_[0-9A-Za-z]{36}|pypi-[0-9A-Za-z_-]{40,}|hf_[0-9A-Za-z]{30,}|[0-9]{8,10}:AA[0-9A-Za-z_-]{33})",
        ),
        (Sensitive::Token, r"\b(eyJ[0-9A-Za-z_-]{8,}\.eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,})"),
        (
            Sensitive::Password,
            r#"(?i)\b(?:password|passwd|passphrase|api[ _-]?key|secret[ _-]?key|access[ _-]?token|auth[ _-]?token|client[ _-]?secret)\b["']?(?:\s*[:=]+\s*|\s+is:?\s+)["']?([^\s"']{6,})"#,
        ),
        (
            Sensitive::BankAccount,
            r"\b([A-Z]{2}[0-9]{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?)\b",
        ),
        (Sensitive::Card, r"\b([0-9](?:[ -]?[0-9]){12,18})\b"),
        (Sensitive::SocialSecurity, r"\b([0-9]{3}-[0-9]{2}-[0-9]{4})\b"),
        (
            Sensitive::Email,
            r"\b([0-9A-Za-z._%+-]+@[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*\.[A-Za-z]{2,})\b",
        ),
        (
            Sensitive::Phone,
            r"(?:^|[^0-9A-Za-z])((?:\+|00)[1-9][0-9]{0,2}(?:[ ().-]{0,2}[0-9]){6,12})\b",
        ),
    ];
    forms
        .into_iter()
        .map(|(kind, form)| {
            (kind, Regex::new(form).expect("the forms are constants that a test compiles"))
        })
        .collect()
});

/// What looks sensitive in `text`: kind and place, in order; what lies inside another finding is left out.
pub(crate) fn sensitive(
    text: &str,
    wanted: impl Fn(Sensitive) -> bool,
) -> Vec<(Sensitive, Range<usize>)> {
    let traits = Traits::of(text);
    search_forms(text, |kind| wanted(kind) && traits.may_hold(kind))
}

/// The same, with a search for every form that is wanted.
fn search_forms(text: &str, wanted: impl Fn(Sensitive) -> bool) -> Vec<(Sensitive, Range<usize>)> {
    // By their starts, with their ends: no two of them overlap.
    let mut found: BTreeMap<usize, (usize, Sensitive)> = BTreeMap::new();
    for &(kind, ref form) in FORMS.iter().filter(|(kind, _)| wanted(*kind)) {
        let mut at = 0;
        while let Some(part) = form.captures_at(text, at).and_then(|captures| captures.get(1)) {
            let is_free = |range: &Range<usize>| {
                let before = found.range(..range.end).next_back();
                before.is_none_or(|(_, (end, _))| *end <= range.start)
            };
            // What follows a number may look like one more group of it, and what precedes it like its first.
            let cuts = separators(kind, part.as_str()).rev();
            let valid = std::iter::once(part.len())
                .chain(cuts)
                .map(|len| part.start()..part.start() + len)
                .find(|range| is_valid(kind, &text[range.clone()]) && is_free(range));
            match valid {
                Some(range) => {
                    at = range.end;
                    found.insert(range.start, (range.end, kind));
                }
                None => {
                    let first = separators(kind, part.as_str()).next();
                    at = part.start() + first.map_or(part.len(), |separator| separator + 1);
                }
            }
        }
    }
    found.into_iter().map(|(start, (end, kind))| (kind, start..end)).collect()
}

/// Where the groups of a number end, but for the last; nowhere in what is not written in groups.
fn separators(kind: Sensitive, part: &str) -> impl DoubleEndedIterator<Item = usize> + '_ {
    let is_grouped = matches!(kind, Sensitive::Card | Sensitive::BankAccount);
    let bytes = part.bytes().enumerate();
    bytes.filter(move |&(_, byte)| is_grouped && matches!(byte, b' ' | b'-')).map(|(at, _)| at)
}

/// Whether a text of the form is what it looks like, so far as it can be computed.
fn is_valid(kind: Sensitive, part: &str) -> bool {
    match kind {
        Sensitive::Card => is_card(part),
        Sensitive::BankAccount => is_bank_account(part),
        Sensitive::SocialSecurity => is_social_security(part),
        _ => true,
    }
}

/// What the bytes of a text say about which forms it cannot hold: one pass over them, where the searches for all the forms
/// took a sixth of the time of a commit of sentences.
#[derive(Debug, Default)]
struct Traits {
    num_digits: usize,
    /// Digits and capital letters.
    num_code: usize,
    has_at: bool,
    /// The longest run of hyphens, and of what tokens are made of.
    hyphens: usize,
    token: usize,
    /// Whether a word for a secret may stand in it.
    names_secret: bool,
}

impl Traits {
    fn of(text: &str) -> Self {
        const DIGIT: u8 = 1;
        const CODE: u8 = 2;
        const HYPHEN: u8 = 4;
        const TOKEN: u8 = 8;
        const CLASSES: [u8; 256] = {
            let mut classes = [0; 256];
            let mut byte = 0;
            while byte < 128 {
                classes[byte] = match byte as u8 {
                    b'0'..=b'9' => DIGIT | CODE | TOKEN,
                    b'A'..=b'Z' => CODE | TOKEN,
                    b'a'..=b'z' | b'_' | b':' | b'.' => TOKEN,
                    b'-' => HYPHEN | TOKEN,
                    _ => 0,
                };
                byte += 1;
            }
            classes
        };
        let mut traits = Self::default();
        let (mut hyphens, mut token) = (0, 0);
        for &byte in text.as_bytes() {
            let class = CLASSES[byte as usize];
            traits.num_digits += usize::from(class & DIGIT != 0);
            traits.num_code += usize::from(class & CODE != 0);
            traits.has_at |= byte == b'@';
            hyphens = if class & HYPHEN != 0 { hyphens + 1 } else { 0 };
            token = if class & TOKEN != 0 { token + 1 } else { 0 };
            traits.hyphens = traits.hyphens.max(hyphens);
            traits.token = traits.token.max(token);
        }
        // Six bytes at least follow the word, so that four can be looked at at once.
        let names = |four: &[u8]| {
            let lower = [four[0] | 0x20, four[1] | 0x20, four[2] | 0x20, four[3] | 0x20];
            let word = u32::from_le_bytes(lower);
            word == u32::from_le_bytes(*b"pass")
                || word == u32::from_le_bytes(*b"secr")
                || word == u32::from_le_bytes(*b"toke")
                || word << 8 == u32::from_le_bytes(*b"\0key")
        };
        // Letter case is that of Unicode: these two are other forms of s and k.
        traits.names_secret = text.as_bytes().windows(4).any(names)
            || (!text.is_ascii() && text.contains(['\u{17f}', '\u{212a}']));
        traits
    }

    /// Whether the shortest text of the form could be there.
    fn may_hold(&self, kind: Sensitive) -> bool {
        match kind {
            Sensitive::PrivateKey => self.hyphens >= 5,
            Sensitive::Token => self.token >= 15,
            Sensitive::Password => self.names_secret,
            Sensitive::BankAccount => self.num_digits >= 2 && self.num_code >= 15,
            Sensitive::Card => self.num_digits >= 13,
            Sensitive::SocialSecurity => self.num_digits >= 9,
            Sensitive::Email => self.has_at,
            Sensitive::Phone => self.num_digits >= 7,
        }
    }
}

/// What a policy says about the turns of a commit.
pub(crate) struct Verdict {
    pub(crate) findings: Vec<Finding>,
    /// Which turns are not to be recalled.
    pub(crate) withheld: Vec<bool>,
}

impl Hygiene {
    fn policy(&self, kind: Sensitive) -> Policy {
        if kind.is_secret() { self.secrets } else { self.personal }
    }

    /// Looks through the turns; `InvalidArgument` if one holds what is refused.
    pub(crate) fn examine(&self, turns: &[NewTurn]) -> Result<Verdict> {
        let mut verdict = Verdict { findings: Vec::new(), withheld: vec![false; turns.len()] };
        if self.secrets == Policy::Ignore && self.personal == Policy::Ignore {
            return Ok(verdict);
        }
        for (turn, new) in turns.iter().enumerate().filter(|(_, new)| new.role != Role::Recalled) {
            let wanted = |kind| self.policy(kind) != Policy::Ignore;
            for (kind, bytes) in sensitive(&new.text, wanted) {
                match self.policy(kind) {
                    Policy::Refuse => {
                        return Err(Error::invalid(format!(
                            "commit: expected no secret or personal data, turn {turn} has what looks like {kind:?} at bytes {}..{}",
                            bytes.start, bytes.end
                        )));
                    }
                    policy => verdict.withheld[turn] |= policy == Policy::Withhold,
                }
                verdict.findings.push(Finding { turn, kind, bytes });
            }
        }
        Ok(verdict)
    }
}

/// The words of a text as far as they can change what it says; empty if there is none.
pub(crate) fn gist(text: &str) -> String {
    let mut gist = String::with_capacity(text.len());
    for line in text.lines() {
        for (at, token) in unquoted(line).split_whitespace().enumerate() {
            let (word, behind) = core(token);
            if behind.is_empty() && is_article(word, at == 0) {
                continue;
            }
            if word.is_ascii() {
                let start = gist.len();
                gist.push_str(word);
                gist[start..].make_ascii_lowercase();
            } else {
                gist.extend(word.chars().flat_map(char::to_lowercase));
            }
            gist.push(' ');
            if behind.contains('?') {
                gist.push_str("? ");
            }
        }
    }
    // Signs alone say too little to be told apart by.
    if gist.contains(char::is_alphanumeric) { gist } else { String::new() }
}

/// A line without the marks of a quotation before it. Before a number such a mark may say that something is more.
fn unquoted(line: &str) -> &str {
    let inner = line.trim_start_matches(['>', ' ', '\t']);
    let first = inner.split_whitespace().next().unwrap_or_default();
    let is_number =
        first.trim_start_matches(|c: char| !c.is_alphanumeric()).starts_with(char::is_numeric);
    if is_number { line } else { inner }
}

/// A token without the marks around it that say nothing, and what was cut off behind it.
fn core(token: &str) -> (&str, &str) {
    if !token.contains(char::is_alphanumeric) {
        return (token, "");
    }
    let mut start = token.len() - token.trim_start_matches(is_mark).len();
    let is_opened = token[..start].contains(|c: char| is_unit(c) || matches!(c, '“' | '‘'));
    // Half of something: `.5`.
    if token[start..].starts_with(char::is_numeric) && token[..start].ends_with('.') {
        start -= 1;
    }
    let mut end = token.trim_end_matches(is_mark).len();
    if !is_opened && token[..end].ends_with(char::is_numeric) {
        end = token.len() - token[end..].trim_start_matches(is_unit).len();
    }
    (&token[start..end], &token[end..])
}

/// Whether a word says nothing: `is_first` in its line or not. A capital letter within a line is a name, as in `plan A`.
fn is_article(word: &str, is_first: bool) -> bool {
    matches!(word, "a" | "an" | "An")
        || word.eq_ignore_ascii_case("the")
        || (is_first && word == "A")
}

/// What may stand around a word and says nothing.
fn is_mark(c: char) -> bool {
    matches!(c, '.' | ',' | ';' | ':' | '!' | '?' | '"' | '\'' | '(' | ')' | '[' | ']' | '{' | '}')
        || matches!(c, '*' | '_' | '`' | '“' | '”' | '‘' | '’' | '…')
}

/// Which of these behind a number may be its unit: inches, feet, stars.
fn is_unit(c: char) -> bool {
    matches!(c, '"' | '\'' | '*' | '”' | '’')
}

fn digits(text: &str) -> impl DoubleEndedIterator<Item = u32> + '_ {
    text.chars().filter_map(|c| c.to_digit(10))
}

/// How the digits of cards are grouped where they stand in groups.
const CARD_GROUPS: [&[usize]; 6] = [
    // Visa, Mastercard, Discover, JCB, UnionPay, Mir, Maestro.
    &[4, 4, 4, 4],
    // American Express, and Maestro of 15 digits.
    &[4, 6, 5],
    // Diners Club.
    &[4, 6, 4],
    // Maestro of 13 digits.
    &[4, 4, 5],
    // Visa and Maestro of 19 digits.
    &[4, 4, 4, 4, 3],
    // UnionPay of 19 digits.
    &[6, 13],
];

/// Whether a number is written as cards are: in one piece, or in the groups of a card with one kind of mark between them.
/// One number in ten has a valid check digit, and a list of dates or scores holds many that begin and end somewhere in it.
fn is_grouped_as_card(text: &str) -> bool {
    let groups = || text.split([' ', '-']).map(str::len);
    let is_mixed = text.contains(' ') && text.contains('-');
    let is_known = || CARD_GROUPS.iter().any(|known| groups().eq(known.iter().copied()));
    groups().count() == 1 || (!is_mixed && is_known())
}

/// Luhn's check digit (ISO/IEC 7812-1), and a length, groups and first digits that cards have.
fn is_card(text: &str) -> bool {
    let sum: u32 = digits(text)
        .rev()
        .enumerate()
        .map(|(at, digit)| match (at % 2, digit * 2) {
            (0, _) => digit,
            (_, doubled) if doubled > 9 => doubled - 9,
            (_, doubled) => doubled,
        })
        .sum();
    // Of those that begin with 2 only Mir and Mastercard, which leaves the years of these times out.
    let issuer = digits(text).take(4).fold(0, |number, digit| number * 10 + digit);
    sum.is_multiple_of(10)
        && (13..=19).contains(&digits(text).count())
        && matches!(issuer, 2200..=2720 | 3000..=6999)
        && is_grouped_as_card(text)
}

/// The check digits of ISO 13616: letters are numbers from 10, the first four characters go last, modulo 97 gives 1.
/// It stands in one piece, or in groups of four with a last one of what is left.
fn is_bank_account(text: &str) -> bool {
    let (full, last) = text.rsplit_once(' ').unwrap_or_default();
    let is_grouped = full.split(' ').all(|group| group.len() == 4) && last.len() <= 4;
    if !full.is_empty() && !is_grouped {
        return false;
    }
    let plain: Vec<char> = text.chars().filter(|c| *c != ' ').collect();
    if !(15..=34).contains(&plain.len()) {
        return false;
    }
    let (head, tail) = plain.split_at(4);
    let rest = tail.iter().chain(head).try_fold(0u32, |rest, c| {
        let value = c.to_digit(36)?;
        Some((rest * if value < 10 { 10 } else { 100 } + value) % 97)
    });
    rest == Some(1)
}

/// Numbers that were never given out are something else.
fn is_social_security(text: &str) -> bool {
    let (area, rest) = text.split_at(3);
    !matches!(area, "000" | "666")
        && !area.starts_with('9')
        && &rest[1..3] != "00"
        && !rest.ends_with("0000")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds(text: &str) -> Vec<Sensitive> {
        sensitive(text, |_| true).into_iter().map(|(kind, _)| kind).collect()
    }

    #[test]
    fn secrets_and_personal_data_are_told_by_their_form() {
        let cases = [
            ("key: AKIAIOSFODNN7EXAMPLE.", Sensitive::Token),
            ("use ghp_abcdefghijklmnopqrstuvwxyz0123456789", Sensitive::Token),
            ("sk-abcdefghijklmnopqrstuvwxyz", Sensitive::Token),
            ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk", Sensitive::Token),
            ("my password is hunter22!", Sensitive::Password),
            ("API_KEY=\"0123456789abcdef\"", Sensitive::Password),
            (
                "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
                Sensitive::PrivateKey,
            ),
            ("card 4111 1111 1111 1111 please", Sensitive::Card),
            ("to DE89 3704 0044 0532 0130 00 today", Sensitive::BankAccount),
            ("SSN 123-45-6789", Sensitive::SocialSecurity),
            ("write to ada.l@example.co.uk", Sensitive::Email),
            ("call +49 (30) 901820 now", Sensitive::Phone),
            ("+1234567", Sensitive::Phone),
            ("xoxb-0123456789", Sensitive::Token),
            ("paſſwd is hunter", Sensitive::Password),
            ("NO9386011117947", Sensitive::BankAccount),
            ("a@b.cd", Sensitive::Email),
        ];
        for (text, kind) in cases {
            assert_eq!(kinds(text), [kind], "{text}");
        }
    }

    #[test]
    fn numbers_are_found_between_others() {
        let cases = [
            ("4111 1111 1111 1111", Sensitive::Card),
            ("4111-1111-1111-1111", Sensitive::Card),
            ("378282246310005", Sensitive::Card),
            ("3782 822463 10005", Sensitive::Card),
            ("ES91 2100 0418 4502 0005 1332", Sensitive::BankAccount),
            ("BE68 5390 0754 7034", Sensitive::BankAccount),
        ];
        for (number, kind) in cases {
            for before in ["", "in 2024 ", "No 7 ", "XX12 "] {
                for behind in ["", " 12/27", " 123", " 1234", " EUR 100", " BIC", "-12 of 14"] {
                    let text = format!("{before}{number}{behind}");
                    let bytes = before.len()..before.len() + number.len();
                    assert_eq!(sensitive(&text, |_| true), [(kind, bytes)], "{text}");
                }
            }
        }
        let two = "4111 1111 1111 1111 378282246310005 BE68 5390 0754 7034 4111 1111 1111 1111";
        let kinds: Vec<_> = sensitive(two, |_| true).into_iter().map(|found| found.0).collect();
        let card = Sensitive::Card;
        assert_eq!(kinds, [card, card, Sensitive::BankAccount, card]);
        // Each is looked up among all that were found before.
        let many = "a@b.cd 123-45-6789 ".repeat(20_000);
        assert_eq!(sensitive(&many, |_| true).len(), 40_000);
    }

    #[test]
    fn ordinary_text_is_neither() {
        for text in [
            "We booked the Gion hotel in Kyoto for 12,000 yen on 2026-11-28 at 10:30.",
            "The number is 1234 5678 9012 3456, not a card.",
            "The password is in the blue drawer.",
            "See section 3.2.1 of RFC 2616, page 4711, and the id 6f1c9a52-7d1e-4c5b-9b57-2d0f5f0a1f10.",
            "GB00 BANK 0000 0000 0000 00 has wrong check digits, 000-12-3456 was never given out.",
        ] {
            assert_eq!(kinds(text), [], "{text}");
        }
    }

    #[test]
    fn lists_of_ordinary_numbers_are_no_cards() {
        let mut seed = 7u64;
        // Knuth's generator (MMIX).
        let mut from = |first: u64, last: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            first + (seed >> 33) % (last - first + 1)
        };
        for _ in 0..300 {
            for form in 0..8 {
                let mut number = || {
                    let (year, month, day) = (from(1950, 2050), from(1, 12), from(1, 28));
                    match form {
                        0 => format!("{year}-{month:02}-{day:02}"),
                        1 => format!("{day:02} {month:02} {year}"),
                        2 => format!("{year}{month:02}{day:02}"),
                        3 => format!("{year}"),
                        4 => format!("{}-{}", from(0, 130), from(0, 130)),
                        5 => format!("{}-{}-{:04}", from(201, 989), from(201, 989), from(0, 9999)),
                        6 => format!("{}-{:04}", from(201, 989), from(0, 9999)),
                        _ => format!("0{} {}", from(150, 179), from(100_000, 999_999)),
                    }
                };
                let numbers: Vec<String> = (0..8).map(|_| number()).collect();
                for between in [" ", "-", ", "] {
                    let text = numbers.join(between);
                    let found = sensitive(&text, |kind| kind == Sensitive::Card);
                    assert_eq!(found, [], "{text}");
                }
            }
        }
    }

    #[test]
    fn an_account_stands_in_one_piece_or_in_fours() {
        assert_eq!(kinds("DE89370400440532013000"), [Sensitive::BankAccount]);
        assert_eq!(kinds("DE89 3704004405320130 00"), []);
    }

    #[test]
    fn a_policy_flags_withholds_or_refuses() {
        let turns =
            [NewTurn::new(Role::User, "Hello."), NewTurn::new(Role::User, "Mail a@b.org now.")];
        let with = |personal| Hygiene { personal, ..Hygiene::default() }.examine(&turns);
        let flagged = with(Policy::Flag).unwrap();
        assert_eq!(flagged.findings, [Finding { turn: 1, kind: Sensitive::Email, bytes: 5..12 }]);
        assert_eq!(flagged.withheld, [false, false]);
        assert_eq!(with(Policy::Withhold).unwrap().withheld, [false, true]);
        assert!(with(Policy::Ignore).unwrap().findings.is_empty());
        let error = with(Policy::Refuse).err().unwrap().to_string();
        assert!(
            error.contains("turn 1") && error.contains("Email") && !error.contains("a@b"),
            "{error}"
        );
    }

    #[test]
    fn a_gist_ignores_form_and_nothing_that_could_change_a_fact() {
        let same = [
            "We booked the Gion hotel in Kyoto.",
            "> we booked  a GION hotel, in Kyoto!",
            "*We booked Gion hotel\nin Kyoto*",
            "> > WE BOOKED THE GION HOTEL\n> > IN KYOTO",
        ];
        assert!(same.iter().all(|text| gist(text) == gist(same[0])));
        for (one, other) in [
            ("A train leaves at 9.", "the train leaves at **9**"),
            ("She said: \"Take 5.\"", "she said take (5)"),
            ("An answer, is it?", "the answer is it ?"),
        ] {
            assert_eq!(gist(one), gist(other), "{one} {other}");
        }
        for (one, other) in [
            ("I like C.", "I like C++."),
            ("I like tea.", "I do not like tea."),
            ("It costs 5.", "It costs $5."),
            ("x = y holds", "x != y holds"),
            ("Room 12.", "Room 21."),
            ("It is -5 here.", "It is 5 here."),
            ("Ada told Bob.", "Bob told Ada."),
            ("My passport.", "Your passport."),
            ("Take 5 mg.", "Take .5 mg."),
            ("Take (5 mg).", "Take (.5 mg)."),
            ("The board is 6\" long.", "The board is 6' long."),
            ("The board is 6\" long.", "The board is 6 long."),
            ("It is 5'6\".", "It is 5'6."),
            ("A hotel of 4*, I think.", "A hotel of 4, I think."),
            ("100 ms is too slow.", "> 100 ms is too slow."),
            ("$100 is too much.", "> $100 is too much."),
            ("The flight is at nine?", "The flight is at nine."),
            ("\"The flight is at nine?\"", "\"The flight is at nine.\""),
            ("We chose plan A.", "We chose the plan."),
            ("We chose plan A today.", "We chose the plan today."),
            ("We chose plan a.", "We chose the plan."),
        ] {
            assert_ne!(gist(one), gist(other), "{one} {other}");
        }
        assert_eq!(gist(" ... !? \n"), "");
    }

    proptest! {
        #[test]
        fn any_text_is_examined_without_a_panic(text in "(?s).{0,300}") {
            for (_, bytes) in sensitive(&text, |_| true) {
                prop_assert!(text.get(bytes).is_some_and(|part| !part.is_empty()));
            }
            prop_assert_eq!(gist(&text), gist(&text.replace(' ', "  ")));
        }

        /// Texts of each form at its shortest, cut, changed in one character, between others.
        #[test]
        fn what_the_bytes_of_a_text_rule_out_is_not_in_it(
            parts in prop::collection::vec((0usize..24, 0usize..50, 0usize..50, "[ -~ſK\u{301}é\n]"), 1..5),
        ) {
            let forms = [
                "AKIAIOSFODNN7EXAMPLE", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "xoxb-0123456789",
                "github_pat_0123456789012345678901", "glpat-01234567890123456789", "sk_live_0123456789abcdef",
                "AIza01234567890123456789012345678901234", "sk-01234567890123456789", "hf_012345678901234567890123456789",
                "12345678:AA012345678901234567890123456789012", "eyJabcdefgh.eyJabcdefgh.abcdefgh",
                "-----BEGIN PRIVATE KEY-----", "password=hunter", "PaſSwd is hunter", "api_\u{212a}ey: abcdef",
                "Secret Key:=\"abcdef", "client secret is: abcdef", "auth-token\n is abcdef", "4000000000006",
                "NO9386011117947", "123-45-6789", "a@b.cd", "+1234567", " 001234567 ",
            ];
            let mut text = String::new();
            for (form, cut, change, with) in parts {
                let mut part: Vec<char> = forms[form].chars().collect();
                if change < part.len() {
                    part.splice(change..change + 1, with.chars());
                }
                part.truncate(cut.max(10));
                text.extend(part);
                text.push(' ');
            }
            prop_assert_eq!(sensitive(&text, |_| true), search_forms(&text, |_| true), "{}", text);
        }
    }
}
