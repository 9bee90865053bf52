// Memory without a model: an agent, whose language model lives elsewhere, remembers, recalls and forgets.
// Knows the public API only.

import Foundation
import MKA

/// Stands where a call to a language model would, which reads `context.text`: it quotes the best memory.
func languageModel(_ context: Context, _ question: String) -> String {
    guard let best = context.hits.first else { return "I know nothing about \"\(question)\"." }
    return "About \"\(question)\" I remember: \(best.text)"
}

let facts = [
    "The hotel in Kyoto is the Sakura Inn, booked from the 3rd of May.",
    "Ada is allergic to peanuts.",
    "The train from Osaka leaves at 9:14 from platform 11.",
    "The passport number is X1234567.",
]
let store = CommandLine.arguments.count > 1 ? CommandLine.arguments[1] : "agent.mka"
let engine = try await Engine.open(at: URL(fileURLWithPath: store))
let memory = engine.memory
let done = try await memory.remember(
    facts.map { NewTurn($0) }, user: "ada", agent: "planner", session: "trip")
print("remembered \(done.chunksAdded) chunks")
let chat = try await engine.session(user: "ada", agent: "planner", session: "trip")
for question in ["Where do we stay in Kyoto?", "When does the train leave?"] {
    print(languageModel(try await chat.context(question, budgetTokens: 200), question))
}
let receipt = try await memory.forget(
    .matching("passport"), user: "ada", agent: "planner", session: "trip")
try await memory.verify(receipt)
let left = try await memory.recall("passport number", user: "ada")
let gone = !left.contains { $0.text.contains("X1234567") }
print("erased \(receipt.turns) turns, passport gone: \(gone)")
try await engine.close()
