// Answers that are held to a grammar.

import Foundation
import MKA
import Testing

@Test func anAnswerFitsItsGrammarAndWhatIsNoneIsRefused() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let bad = SendOptions(maxNewTokens: 9, grammar: .regex("("))
    let refused = await failure { try await chat.send("hello", options: bad).text() }
    #expect(refused?.kind == .invalidArgument && refused?.message.contains("grammar: ") == true)
    #expect(try chat.numTurns == 0)
    let digits = SendOptions(maxNewTokens: 9, grammar: .regex("[0-9]{3}"))
    let answer = try await chat.send("hello", options: digits).text()
    #expect(answer.text.count == 3 && Int(answer.text) != nil && answer.usage.stop == .endOfTurn)
    let yes = SendOptions(maxNewTokens: 9, grammar: .jsonSchema("{\"const\": \"yes\"}"))
    let quoted = try await chat.regenerate(options: yes).text()
    #expect(quoted.text == "\"yes\"")
    let maybe = SendOptions(maxNewTokens: 9, grammar: .lark("start: \"may\" \"be\""))
    let joined = try await chat.regenerate(options: maybe).text()
    #expect(joined.text == "maybe")
    let object = SendOptions(maxNewTokens: 1, grammar: .jsonObject)
    let begun = try await chat.regenerate(options: object).text()
    #expect(begun.text == "{" && begun.usage.stop == .maxTokens)
    try await engine.close()
}
