// Tools: what a session is offered, what a model calls, what comes back.

import Foundation
import MKA
import Testing

@Test func callsAreReadFromAnAnswer() {
    let answer = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>"
    #expect(toolCalls(in: answer) == [ToolCall(name: "add", arguments: "{\"a\": 1}")])
    #expect(toolCalls(in: "It is late.").isEmpty)
}

@Test func resultsAreTurnsOfTheirOwnAndToolsWithoutAPlaceAreRefused() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let offering = SendOptions(maxNewTokens: 2, tools: ["{\"name\": \"now\"}"])
    let refused = await failure { try await chat.send("hello", options: offering).text() }
    #expect(refused?.kind == .invalidArgument && refused?.message.contains("no place for them") == true)
    let early = await failure { try await chat.sendTool("9:14", options: short(2)).text() }
    #expect(early?.kind == .invalidArgument)
    _ = try await chat.send("hello", options: short(2)).text()
    let results = [ToolResult(content: "It is 9:14.", name: "now"), ToolResult(content: "It rains.")]
    _ = try await chat.sendTool(results, options: short(2)).text()
    _ = try await chat.sendTool("It snows.", options: short(2)).text()
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    #expect(turns.map(\.role) == [.user, .assistant, .tool, .tool, .assistant, .tool, .assistant])
    #expect(turns[2].source == "now" && turns[3].text == "It rains.")
    try await engine.close()
}
