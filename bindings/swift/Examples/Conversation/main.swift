// One scripted conversation from Swift; its twins in Rust and Python print the same bytes.
// `Conversation STORE MODEL SCRIPT FROM TO` runs steps FROM to before TO of SCRIPT and prints a line an event.

import Foundation
import MKA

struct Step: Decodable {
    var send: String?
    var remember: String?
    var feed: String?
    var times: Int?
    var mode: String?
    var max_new_tokens: UInt64?
    var across_sessions: Bool?
    var temperature: Float?
    var seed: UInt64?
}

/// The first step's time; each is a second later. Milliseconds since 1970.
let startMilliseconds: Int64 = 1_700_000_000_000

func show(_ event: Event) {
    switch event {
    case .recalled(let hits):
        for hit in hits { print("hit", hit.chunk, hit.source.session, hit.source.turn) }
    case .token(let token):
        print("token", token.text.utf8.map { String(format: "%02x", $0) }.joined())
    case .done(let usage):
        let stop =
            switch usage.stop {
            case .endOfTurn: "end_of_turn"
            case .maxTokens: "max_tokens"
            case .stopString: "stop_string"
            }
        print(
            "done", usage.promptTokens, usage.reusedTokens, usage.recalledTokens,
            usage.generatedTokens, usage.streamTokens, stop)
    }
}

let arguments = CommandLine.arguments
guard arguments.count == 6, let from = Int(arguments[4]), let to = Int(arguments[5]) else {
    print("expected STORE MODEL SCRIPT FROM TO")
    exit(2)
}
let script = try Data(contentsOf: URL(fileURLWithPath: arguments[3]))
let steps = try JSONDecoder().decode([Step].self, from: script)
let engine = try await Engine.open(
    at: URL(fileURLWithPath: arguments[1]),
    model: .path(URL(fileURLWithPath: arguments[2])),
    options: EngineOptions(device: "cpu", windowTokens: 128, blockTokens: 64))
let chat = try await engine.session(user: "ada", session: "trip")
for i in from..<min(to, steps.count) {
    print("step", i)
    let step = steps[i]
    let time = startMilliseconds + 1000 * Int64(i)
    if let text = step.remember {
        let turn = NewTurn(text, time: Date(timeIntervalSince1970: Double(time) / 1000))
        let done = try await engine.memory.remember([turn], user: "ada", session: "facts")
        print("remembered", done.chunksAdded)
    } else if let text = step.feed {
        let whole = String(repeating: text, count: step.times ?? 1)
        let options = FeedOptions(mode: step.mode == "model" ? .model : .text, timeMs: time)
        let fed = try await chat.feed(whole, options: options).finish()
        print("fed", fed.bytes, fed.modelTokens, fed.chunksAdded, fed.chunksDeduplicated)
    } else {
        let options = SendOptions(
            temperature: step.temperature ?? 0, seed: step.seed ?? 0,
            maxNewTokens: step.max_new_tokens, acrossSessions: step.across_sessions ?? false,
            timeMs: time)
        let events =
            step.send.map { chat.send($0, options: options) } ?? chat.regenerate(options: options)
        for try await event in events { show(event) }
    }
}
try await engine.close()
