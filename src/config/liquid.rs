//! Liquid templates, as those of minijinja. Called by `convert` only; what cannot be said here is told, and stays as text.

/// Filters by their names there and here.
const FILTERS: [(&str, &str); 16] = [
    ("abs", "abs"),
    ("capitalize", "capitalize"),
    ("downcase", "lower"),
    ("first", "first"),
    ("join", "join"),
    ("json", "tojson"),
    ("last", "last"),
    ("replace", "replace"),
    ("reverse", "reverse"),
    ("round", "round"),
    ("size", "length"),
    ("sort", "sort"),
    ("split", "split"),
    ("strip", "trim"),
    ("uniq", "unique"),
    ("upcase", "upper"),
];
/// Filters that are operators here.
const OPERATORS: [(&str, &str); 6] = [
    ("append", "~"),
    ("divided_by", "//"),
    ("minus", "-"),
    ("modulo", "%"),
    ("plus", "+"),
    ("times", "*"),
];

/// A template of ours.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Translated {
    pub text: String,
    /// What could not be said: the line of the template, from 0, and what it is.
    pub left: Vec<(usize, String)>,
}

/// What is looked up in for an edge of the start, of which only the content is known.
pub(super) const START: &str = "start";

/// The template, with names that it does not make itself looked up in `root`.
pub(super) fn translate(template: &str, root: &str) -> Translated {
    let mut translation = Translation {
        root,
        names: Vec::new(),
        blocks: Vec::new(),
    };
    let mut translated = Translated::default();
    let mut rest = template;
    while let Some(start) = rest.find("{{").into_iter().chain(rest.find("{%")).min() {
        let (before, tag) = rest.split_at(start);
        translated.text.push_str(&verbatim(before));
        let line = template[..template.len() - tag.len()].matches('\n').count();
        let length = length_of(tag);
        let (source, after) = tag.split_at(length);
        rest = after;
        match translation.tag(source) {
            Ok(Tag::Text(text)) => translated.text.push_str(&text),
            Ok(Tag::Until(end, keep)) => {
                let Some(skipped) = find_tag(rest, end) else {
                    translated.left.push((line, format!("a tag without {end}")));
                    translated.text.push_str(&verbatim(source));
                    continue;
                };
                let length = skipped + length_of(&rest[skipped..]);
                if keep {
                    translated.text.push_str(source);
                    translated.text.push_str(&rest[..length]);
                }
                rest = &rest[length..];
            }
            Err(what) => {
                translated.left.push((line, what));
                translated.text.push_str(&verbatim(source));
            }
        }
    }
    translated.text.push_str(&verbatim(rest));
    translated
}

/// Where the tag of this name begins.
fn find_tag(text: &str, name: &str) -> Option<usize> {
    let is_it = |at: &usize| {
        let inner = &text[at + 2..];
        let inner = inner.strip_prefix('-').unwrap_or(inner);
        inner.trim_start().starts_with(name)
    };
    text.match_indices("{%").map(|(at, _)| at).find(is_it)
}

/// Text in which nothing is a template.
pub(super) fn verbatim(text: &str) -> String {
    if ["{{", "{%", "{#"].iter().any(|mark| text.contains(mark)) {
        format!("{{% raw %}}{text}{{% endraw %}}")
    } else {
        text.to_owned()
    }
}

/// Bytes of the tag at the beginning of a text, its end included.
fn length_of(tag: &str) -> usize {
    let end = if tag.starts_with("{{") { "}}" } else { "%}" };
    let mut quote = None;
    for (at, c) in tag.char_indices() {
        match quote {
            Some(open) if open == c => quote = None,
            None if c == '"' || c == '\'' => quote = Some(c),
            None if tag[at..].starts_with(end) => return at + end.len(),
            _ => {}
        }
    }
    tag.len()
}

enum Tag {
    Text(String),
    /// All up to the end of the tag of this name goes, or stays as it is.
    Until(&'static str, bool),
}

struct Translation<'a> {
    root: &'a str,
    /// What the template made itself.
    names: Vec<String>,
    /// The blocks that are open: whether they could be said.
    blocks: Vec<bool>,
}

impl Translation<'_> {
    fn tag(&mut self, source: &str) -> Result<Tag, String> {
        let (open, inner) = source.split_at(2);
        let inner = inner.strip_suffix(if open == "{{" { "}}" } else { "%}" });
        let inner = inner.ok_or("a tag that is not closed")?;
        let (left, inner) = match inner.strip_prefix('-') {
            Some(inner) => ("-", inner),
            None => ("", inner),
        };
        let (right, inner) = match inner.strip_suffix('-') {
            Some(inner) => ("-", inner),
            None => ("", inner),
        };
        let inner = inner.trim();
        if open == "{{" {
            let value = self.filtered(inner)?;
            return Ok(Tag::Text(format!("{{{{{left} {value} {right}}}}}")));
        }
        let (word, rest) = inner.split_once(char::is_whitespace).unwrap_or((inner, ""));
        let is_inner = matches!(word, "else" | "elsif" | "when") || word.starts_with("end");
        if is_inner && self.blocks.last() == Some(&false) {
            // Was told when the block began.
            self.blocks
                .truncate(self.blocks.len() - usize::from(word.starts_with("end")));
            return Ok(Tag::Text(verbatim(source)));
        }
        let said = self.statement(word, rest.trim());
        match word {
            "if" | "unless" | "for" | "case" => self.blocks.push(said.is_ok()),
            word if word.starts_with("end") => drop(self.blocks.pop()),
            _ => {}
        }
        Ok(match said? {
            Tag::Text(said) => Tag::Text(format!("{{%{left} {said} {right}%}}")),
            skipped @ Tag::Until(..) => skipped,
        })
    }

    /// What is between `{%` and `%}`.
    fn statement(&mut self, word: &str, rest: &str) -> Result<Tag, String> {
        let said = match word {
            "comment" => return Ok(Tag::Until("endcomment", false)),
            "raw" => return Ok(Tag::Until("endraw", true)),
            "if" => format!("if {}", self.condition(rest)?),
            "elsif" => format!("elif {}", self.condition(rest)?),
            "unless" => format!("if not ({})", self.condition(rest)?),
            "endunless" => "endif".to_owned(),
            "else" | "endif" | "endfor" => word.to_owned(),
            "for" => {
                let (name, list) = rest.split_once(" in ").ok_or("a for without in")?;
                let list = list.trim();
                if list.contains(char::is_whitespace) || list.starts_with('(') {
                    return Err(format!("for over {list}"));
                }
                let list = self.value(list)?;
                self.names.push(name.trim().to_owned());
                format!("for {} in {list}", name.trim())
            }
            "assign" => {
                let (name, value) = rest.split_once('=').ok_or("an assign without =")?;
                let value = self.filtered(value.trim())?;
                self.names.push(name.trim().to_owned());
                format!("set {} = {value}", name.trim())
            }
            _ => return Err(format!("the tag {word}")),
        };
        Ok(Tag::Text(said))
    }

    /// `a | join: ", " | upcase`
    fn filtered(&self, text: &str) -> Result<String, String> {
        let mut parts = split(text, '|').into_iter();
        let mut value = self.value(parts.next().unwrap_or_default())?;
        for part in parts {
            let (name, arguments) = part.split_once(':').unwrap_or((part, ""));
            let name = name.trim();
            let arguments = split(arguments, ',').into_iter();
            let arguments = arguments.filter(|argument| !argument.is_empty());
            let mut arguments = arguments
                .map(|argument| self.value(argument))
                .collect::<Result<Vec<_>, _>>()?;
            let of = |table: &[(&str, &'static str)]| {
                table
                    .iter()
                    .find(|(there, _)| *there == name)
                    .map(|(_, here)| *here)
            };
            value = match (of(&OPERATORS), of(&FILTERS), arguments.first()) {
                (Some(operator), _, Some(argument)) => format!("({value} {operator} {argument})"),
                (_, Some("join"), None) => format!("{value} | join(\" \")"),
                (_, Some(filter), None) => format!("{value} | {filter}"),
                (_, Some(filter), Some(_)) => {
                    format!("{value} | {filter}({})", arguments.join(", "))
                }
                (_, _, Some(argument)) if name == "prepend" => format!("({argument} ~ {value})"),
                (_, _, Some(_)) if name == "default" => {
                    // There nothing, false and empty text have the default, too.
                    arguments.push("true".to_owned());
                    format!("{value} | default({})", arguments.join(", "))
                }
                _ => return Err(format!("the filter {name}")),
            };
        }
        Ok(value)
    }

    /// `a == "b" and c contains "d"`
    fn condition(&self, text: &str) -> Result<String, String> {
        let mut words: Vec<String> = Vec::new();
        let mut joined: Option<&str> = None;
        for word in split(text, ' ').into_iter().filter(|word| !word.is_empty()) {
            match word {
                "==" | "!=" | "<" | ">" | "<=" | ">=" | "contains" => words.push(word.to_owned()),
                "<>" => words.push("!=".to_owned()),
                "and" | "or" => {
                    // Which of them comes first is another matter there.
                    if joined.replace(word).is_some_and(|other| other != word) {
                        return Err("and beside or in one condition".to_owned());
                    }
                    words.push(word.to_owned());
                }
                value => {
                    let value = self.value(value)?;
                    match words.last().map(String::as_str) {
                        // What is looked for stands first here.
                        Some("contains") if words.len() > 1 => {
                            words.pop();
                            let whole = words.pop().unwrap_or_default();
                            words.push(format!("{value} in {whole}"));
                        }
                        _ => words.push(value),
                    }
                }
            }
        }
        Ok(words.join(" "))
    }

    /// A literal, or a path.
    fn value(&self, text: &str) -> Result<String, String> {
        let text = text.trim();
        let is_quoted = |quote| text.len() > 1 && text.starts_with(quote) && text.ends_with(quote);
        if is_quoted('"') || is_quoted('\'') {
            return Ok(text.replace('\\', "\\\\"));
        }
        match text {
            "true" | "false" => return Ok(text.to_owned()),
            "nil" | "null" => return Ok("none".to_owned()),
            "blank" | "empty" => return Ok("\"\"".to_owned()),
            "" => return Err("a tag without a value".to_owned()),
            _ => {}
        }
        if text.parse::<f64>().is_ok() {
            return Ok(text.to_owned());
        }
        let is_path = |c: char| c.is_ascii_alphanumeric() || "_$-.[]\"'".contains(c);
        if !text.chars().all(is_path) || text.starts_with(['.', '[', '-']) {
            return Err(text.to_owned());
        }
        let end = text.find(['.', '[']).unwrap_or(text.len());
        let (name, path) = text.split_at(end);
        let mut value = match name {
            "forloop" => "loop".to_owned(),
            "_body" => "last.content".to_owned(),
            name if self.names.iter().any(|known| known == name) => name.to_owned(),
            "task" | "prompt" if self.root == START => "start.content".to_owned(),
            name if self.root == START => {
                return Err(format!("{name}, which no run is started with,"));
            }
            "$status" => format!("{}.status", self.root),
            name => step(self.root, name),
        };
        let mut rest = path;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('.') {
                let end = after.find(['.', '[']).unwrap_or(after.len());
                value = match &after[..end] {
                    "size" if name != "forloop" => format!("({value} | length)"),
                    word @ ("first" | "last") if name != "forloop" => format!("({value} | {word})"),
                    key => step(&value, key),
                };
                rest = &after[end..];
            } else {
                let end = rest.find(']').ok_or_else(|| text.to_owned())? + 1;
                value.push_str(&rest[..end]);
                rest = &rest[end..];
            }
        }
        Ok(value)
    }
}

/// What is below a value.
fn step(value: &str, name: &str) -> String {
    if name.contains(['-', '$']) {
        format!("{value}[\"{name}\"]")
    } else {
        format!("{value}.{name}")
    }
}

/// The parts between separators that are not in quotes, trimmed.
fn split(text: &str, separator: char) -> Vec<&str> {
    let (mut parts, mut start, mut quote) = (Vec::new(), 0, None);
    for (at, c) in text.char_indices() {
        match quote {
            Some(open) if open == c => quote = None,
            None if c == '"' || c == '\'' => quote = Some(c),
            None if c == separator || (separator == ' ' && c.is_whitespace()) => {
                parts.push(text[start..at].trim());
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_liquid_says_is_said_in_our_words() {
        for (liquid, ours) in [
            ("no tags, {single} braces", "no tags, {single} braces"),
            ("{{ plan }}", "{{ last.meta.plan }}"),
            (
                "{{plan.steps[0].name}}",
                "{{ last.meta.plan.steps[0].name }}",
            ),
            ("{{ pr-number }}", "{{ last.meta[\"pr-number\"] }}"),
            (
                "{{ _body }}{{ $status }}",
                "{{ last.content }}{{ last.meta.status }}",
            ),
            ("{{- a | upcase -}}", "{{- last.meta.a | upper -}}"),
            (
                "{{ a | join }}{{ a | join: ', | ' | strip }}",
                "{{ last.meta.a | join(\" \") }}{{ last.meta.a | join(', | ') | trim }}",
            ),
            (
                "{{ a | default: \"b\\c\" }}",
                "{{ last.meta.a | default(\"b\\\\c\", true) }}",
            ),
            (
                "{{ a | append: '!' | prepend: b }}",
                "{{ (last.meta.b ~ (last.meta.a ~ '!')) }}",
            ),
            (
                "{% if a == 'x' and b contains \"c d\" %}1{% elsif n != nil %}2{% else %}3{% endif %}",
                "{% if last.meta.a == 'x' and \"c d\" in last.meta.b %}1{% elif last.meta.n != none %}2{% else %}3{% endif %}",
            ),
            (
                "{% unless ok %}no{% endunless %}",
                "{% if not (last.meta.ok) %}no{% endif %}",
            ),
            (
                "{% for i in items %}{{ forloop.index }}. {{ i.title }}{% endfor %}",
                "{% for i in last.meta.items %}{{ loop.index }}. {{ i.title }}{% endfor %}",
            ),
            (
                "{% assign x = a | size %}{{ x }}",
                "{% set x = last.meta.a | length %}{{ x }}",
            ),
            ("a{% comment %}{{ b }}{% endcomment %}c", "ac"),
            (
                "a{%- comment -%}{{ b }}{%-endcomment-%}c{%comment%}d{%endcomment%}e",
                "ace",
            ),
            (
                "{% if items.size > 1 %}{{ items.first.name }}{% endif %}",
                "{% if (last.meta.items | length) > 1 %}{{ (last.meta.items | first).name }}{% endif %}",
            ),
            (
                "{% for i in items %}{% if forloop.last %}{{ i.last }}{% endif %}{% endfor %}",
                "{% for i in last.meta.items %}{% if loop.last %}{{ (i | last) }}{% endif %}{% endfor %}",
            ),
            (
                "{# a #}{{ b }}{#",
                "{% raw %}{# a #}{% endraw %}{{ last.meta.b }}{% raw %}{#{% endraw %}",
            ),
            (
                "{% raw %}{{ b }}{% endraw %}",
                "{% raw %}{{ b }}{% endraw %}",
            ),
        ] {
            let translated = translate(liquid, "last.meta");
            assert_eq!(
                (translated.text.as_str(), translated.left),
                (ours, vec![]),
                "{liquid}"
            );
        }
    }

    #[test]
    fn of_the_start_only_the_task_is_known() {
        let translated = translate("{{ task }}, {{ prompt | upcase }}, {{ repo }}", START);
        let text =
            "{{ start.content }}, {{ start.content | upper }}, {% raw %}{{ repo }}{% endraw %}";
        assert_eq!(translated.text, text);
        let left = (0, "repo, which no run is started with,".to_owned());
        assert_eq!(translated.left, [left]);
    }

    #[test]
    fn what_cannot_be_said_stays_as_text_and_is_told() {
        for (liquid, what) in [
            ("\n{{ a | truncate: 9 }}", "the filter truncate"),
            ("\n{{ a | lstrip }}", "the filter lstrip"),
            ("\n{% comment %}a", "a tag without endcomment"),
            (
                "\n{% case a %}{% when 1 %}{% else %}{% endcase %}",
                "the tag case",
            ),
            ("\n{% if a | b %}{% elsif c %}{% endif %}", "|"),
            ("\n{% for i in (1..3) %}", "for over (1..3)"),
            ("\n{% if a and b or c %}", "and beside or in one condition"),
            ("\n{{ a", "a tag that is not closed"),
            ("\n{{ }}", "a tag without a value"),
        ] {
            let translated = translate(liquid, "last.meta");
            assert_eq!(translated.left, [(1, what.to_owned())], "{liquid}");
            let text = translated
                .text
                .replace("{% raw %}", "")
                .replace("{% endraw %}", "");
            assert_eq!(text, liquid, "{translated:?}");
            let closed = !liquid.ends_with("{{ a") && !liquid.contains("for i");
            assert!(!closed || super::super::template::check(&translated.text, &[]).is_empty());
        }
    }
}
