//! Tools through the surface: what is offered, what is called, what comes back.

use crate::{engine, finish, tokens, trip};
use mka_bindings::{MkaError, Role, SendOptions, ToolCall, ToolResult, tool_calls};

#[test]
fn results_are_answered_and_tools_without_a_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let offering = SendOptions { tools: vec![r#"{"name": "now"}"#.into()], ..tokens(2) };
    let refused = finish(&chat.send("hello".into(), offering.clone()).unwrap()).unwrap_err();
    let expected = "no place for them";
    assert!(matches!(&refused, MkaError::InvalidArgument(text) if text.contains(expected)));
    finish(&chat.send("hello".into(), tokens(2)).unwrap()).unwrap();
    let given = |content: &str, name: Option<&str>| ToolResult {
        content: content.into(),
        name: name.map(str::to_owned),
    };
    let results = vec![given("it is 9:14", Some("now")), given("", None)];
    // Tools are for a session's beginning.
    assert!(finish(&chat.send_tool(results, offering).unwrap()).unwrap().1);
    let turns = engine.clone().memory().turns_blocking(trip(), 0, 9).unwrap();
    let told: Vec<(Role, Option<&str>)> =
        turns.iter().map(|turn| (turn.role, turn.source.as_deref())).collect();
    let tools = [(Role::Tool, Some("now")), (Role::Tool, None)];
    let said = [(Role::User, None), (Role::Assistant, None)];
    assert_eq!(told, [&said[..], &tools, &said[1..]].concat());
    let none = finish(&chat.send_tool(Vec::new(), tokens(2)).unwrap()).unwrap_err();
    assert!(matches!(&none, MkaError::InvalidArgument(text) if text.contains("no result")));
}

#[test]
fn calls_are_read_from_an_answer() {
    let answer = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>";
    let add = ToolCall { name: "add".into(), arguments: "{\"a\": 1}".into() };
    assert_eq!(tool_calls(answer.into()), [add]);
    assert_eq!(tool_calls("It is late.".into()), []);
}
