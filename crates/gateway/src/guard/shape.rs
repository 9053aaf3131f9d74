//! Where the texts of an answer's object are.
//!
//! A guarded answer keeps the fields named here and no others: a field that no
//! one here knows could carry text around the guard. Those left out are named,
//! and written down. Log-probabilities and token ids spell the text out a second
//! time, so they are among them. What is not of the protocol's form at all ends
//! the answer.

use serde_json::{Map, Value, json};

/// Strings of this many bytes at most are taken for names.
const NAME: usize = 256;

/// A text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Leaf {
    /// Where, as a JSON pointer.
    pub(super) at: String,
    pub(super) choice: u64,
    /// Which of the choice's texts.
    pub(super) channel: String,
}

/// What an object holds.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Shape {
    pub(super) leaves: Vec<Leaf>,
    /// Choices in it with their places, and whether they end here.
    pub(super) choices: Vec<(u64, usize, bool)>,
    /// Names in it, with what they name.
    pub(super) names: Vec<(String, String)>,
    /// Fields that were taken out.
    pub(super) removed: Vec<String>,
    /// It says something beside its texts.
    pub(super) speaks: bool,
}

/// Reads an object and takes out of it what is not known.
///
/// # Errors
/// A word for what is not of the protocol's form.
pub(super) fn read(object: &mut Map<String, Value>) -> Result<Shape, &'static str> {
    let mut shape = Shape::default();
    shape.keep(object, "", |shape, key, value| match key {
        "object" | "system_fingerprint" | "service_tier" => shape.name(key, value),
        "created" => value.is_number(),
        "timings" => inert(value),
        "choices" => true,
        _ => false,
    });
    let choices = object.get_mut("choices").and_then(Value::as_array_mut).ok_or("choices_missing")?;
    for (place, choice) in choices.iter_mut().enumerate() {
        let choice = choice.as_object_mut().ok_or("choice_no_object")?;
        let index = match choice.get("index") {
            None => 0,
            Some(index) => index.as_u64().ok_or("choice_index")?,
        };
        let mut at = format!("/choices/{place}");
        let mut ends = false;
        shape.keep(choice, "choices.", |shape, key, value| match key {
            "index" => true,
            "finish_reason" => {
                ends = value.is_string();
                shape.name(key, value)
            }
            "delta" | "message" => value.is_object(),
            "text" => value.is_string(),
            _ => false,
        });
        shape.choices.push((index, place, ends));
        shape.speaks |= ends;
        if choice.get("text").is_some_and(Value::is_string) {
            shape.leaf(format!("{at}/text"), index, "text");
        }
        let parts = ["delta", "message"].map(|k| choice.get(k).is_some_and(Value::is_object));
        let key = match parts {
            [true, true] => return Err("choice_twice"),
            [true, false] => "delta",
            [false, true] => "message",
            _ => continue,
        };
        at.push('/');
        at.push_str(key);
        if let Some(message) = choice.get_mut(key).and_then(Value::as_object_mut) {
            shape.message(message, &at, index)?;
        }
    }
    Ok(shape)
}

impl Shape {
    fn leaf(&mut self, at: String, choice: u64, channel: impl Into<String>) {
        self.leaves.push(Leaf { at, choice, channel: channel.into() });
    }

    /// Keeps the fields of `map` that `known` says yes to; nulls stay.
    fn keep(&mut self, map: &mut Map<String, Value>, path: &str, mut known: impl FnMut(&mut Self, &str, &Value) -> bool) {
        let keys: Vec<String> = map.keys().cloned().collect();
        for key in keys {
            let value = map.get(&key).cloned().unwrap_or_default();
            if value.is_null() || known(self, &key, &value) {
                continue;
            }
            // `logprobs` is a key that clients read whether it is null or not.
            if key == "logprobs" {
                map.insert(key.clone(), Value::Null);
            } else {
                map.shift_remove(&key);
            }
            let key: String = key.chars().take(40).collect();
            let name = format!("{path}{key}");
            if !self.removed.contains(&name) {
                self.removed.push(name);
            }
        }
    }

    /// A string that names something, and is short.
    fn name(&mut self, key: &str, value: &Value) -> bool {
        let Some(text) = value.as_str().filter(|t| t.len() <= NAME) else { return false };
        self.names.push((key.to_owned(), text.to_owned()));
        true
    }

    fn message(&mut self, message: &mut Map<String, Value>, at: &str, choice: u64) -> Result<(), &'static str> {
        let mut found = Vec::new();
        self.keep(message, "message.", |shape, key, value| match key {
            "role" => {
                shape.speaks = true;
                shape.name(key, value)
            }
            "content" | "refusal" | "reasoning_content" | "reasoning" => {
                found.push(key.to_owned());
                value.is_string()
            }
            "tool_calls" => value.is_array(),
            "function_call" => value.is_object(),
            "annotations" => value.as_array().is_some_and(Vec::is_empty),
            _ => false,
        });
        for key in found {
            match message.get(&key) {
                Some(Value::String(_)) => self.leaf(format!("{at}/{key}"), choice, key),
                _ => return Err("text_no_string"),
            }
        }
        if let Some(call) = message.get_mut("function_call").and_then(Value::as_object_mut) {
            self.call(call, &format!("{at}/function_call"), choice, "function_call", "arguments")?;
        }
        let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else { return Ok(()) };
        for (place, call) in calls.iter_mut().enumerate() {
            let call = call.as_object_mut().ok_or("call_no_object")?;
            let index = match call.get("index") {
                None => place as u64,
                Some(index) => index.as_u64().ok_or("call_index")?,
            };
            let path = format!("tool_calls/{index}");
            self.keep(call, "tool_calls.", |shape, key, value| match key {
                "index" => true,
                "id" => {
                    shape.speaks = true;
                    shape.name(&format!("{choice}/{path}/id"), value)
                }
                "type" => shape.name(key, value),
                "function" | "custom" => value.is_object(),
                _ => false,
            });
            for (kind, text) in [("function", "arguments"), ("custom", "input")] {
                if let Some(inner) = call.get_mut(kind).and_then(Value::as_object_mut) {
                    self.call(inner, &format!("{at}/tool_calls/{place}/{kind}"), choice, &format!("{path}/{kind}"), text)?;
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, call: &mut Map<String, Value>, at: &str, choice: u64, path: &str, text: &str) -> Result<(), &'static str> {
        let mut arguments = false;
        self.keep(call, "call.", |shape, key, value| match key {
            "name" => {
                shape.speaks = true;
                shape.name(&format!("{choice}/{path}/name"), value)
            }
            key if key == text => {
                arguments = true;
                value.is_string()
            }
            _ => false,
        });
        if arguments {
            match call.get(text) {
                Some(Value::String(_)) => self.leaf(format!("{at}/{text}"), choice, path),
                _ => return Err("arguments_no_string"),
            }
        }
        Ok(())
    }
}

/// Whether it holds no string.
fn inert(value: &Value) -> bool {
    match value {
        Value::String(_) => false,
        Value::Array(items) => items.iter().all(inert),
        Value::Object(map) => map.values().all(inert),
        _ => true,
    }
}

/// A choice of a stream that adds `text` to one of its channels.
pub(super) fn addition(choice: u64, channel: &str, text: &str) -> Value {
    let delta = |delta: Value| json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": null});
    let mut path = channel.split('/');
    match (path.next(), path.next().and_then(|n| n.parse::<u64>().ok()), path.next()) {
        (Some("text"), ..) => json!({"index": choice, "text": text, "logprobs": null, "finish_reason": null}),
        (Some("tool_calls"), Some(index), Some("custom")) => {
            delta(json!({"tool_calls": [{"index": index, "custom": {"input": text}}]}))
        }
        (Some("tool_calls"), Some(index), _) => {
            delta(json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]}))
        }
        (Some("function_call"), ..) => delta(json!({"function_call": {"arguments": text}})),
        _ => delta(json!({channel: text})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(value: Value) -> (Result<Shape, &'static str>, Value) {
        let mut map = value.as_object().unwrap().clone();
        let shape = read(&mut map);
        (shape, Value::Object(map))
    }

    #[test]
    fn texts_are_found_and_the_unknown_is_taken_out() {
        let (found, left) = shape(json!({
            "object": "chat.completion.chunk", "created": 5, "odd": {"kept": "no"}, "timings": {"predicted_n": 3},
            "choices": [
                {"index": 1, "delta": {"role": "assistant", "content": "a", "reasoning_content": "b", "new_text": "x",
                    "tool_calls": [{"index": 2, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "y": 1}}]},
                 "logprobs": {"content": [{"token": "a"}]}, "token_ids": [1], "finish_reason": null},
                {"index": 0, "text": "t", "logprobs": null, "finish_reason": "stop"}]}));
        let found = found.unwrap();
        let channels: Vec<_> = found.leaves.iter().map(|l| (l.choice, l.channel.as_str())).collect();
        assert_eq!(channels, [(1, "content"), (1, "reasoning_content"), (1, "tool_calls/2/function"), (0, "text")]);
        for leaf in &found.leaves {
            assert!(left.pointer(&leaf.at).unwrap().is_string(), "{}", leaf.at);
        }
        assert_eq!(found.removed, ["odd", "choices.logprobs", "choices.token_ids", "message.new_text", "call.y"]);
        assert_eq!(found.choices, [(1, 0, false), (0, 1, true)]);
        assert_eq!(left["choices"][0]["logprobs"], Value::Null);
        assert!(!left.to_string().contains("new_text") && left["timings"]["predicted_n"] == 3);
    }

    #[test]
    fn what_has_another_form_ends_the_answer() {
        for (wrong, word) in [
            (json!({"choices": {}}), "choices_missing"),
            (json!({"data": []}), "choices_missing"),
            (json!({"choices": ["text"]}), "choice_no_object"),
            (json!({"choices": [{"index": "0", "text": "x"}]}), "choice_index"),
            (json!({"choices": [{"delta": {"content": [{"type": "text", "text": "x"}]}}]}), "text_no_string"),
            (json!({"choices": [{"delta": {}, "message": {}}]}), "choice_twice"),
            (json!({"choices": [{"delta": {"tool_calls": ["x"]}}]}), "call_no_object"),
            (json!({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}}]}), "arguments_no_string"),
        ] {
            assert_eq!(shape(wrong.clone()).0, Err(word), "{wrong}");
        }
    }

    #[test]
    fn an_addition_lands_in_its_channel() {
        for (channel, at) in [
            ("content", "/delta/content"), ("text", "/text"), ("reasoning", "/delta/reasoning"),
            ("tool_calls/3/function", "/delta/tool_calls/0/function/arguments"),
            ("tool_calls/3/custom", "/delta/tool_calls/0/custom/input"),
            ("function_call", "/delta/function_call/arguments"),
        ] {
            let choice = addition(4, channel, "rest");
            assert_eq!(choice.pointer(at).unwrap(), "rest", "{channel}");
            let (found, _) = shape(json!({"choices": [choice]}));
            let found = found.unwrap();
            assert_eq!((found.leaves[0].choice, found.leaves[0].channel.as_str()), (4, channel));
            assert!(found.removed.is_empty());
        }
    }
}
