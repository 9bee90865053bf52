// Owns one conversation: its streams and its context.
// Knows neither engine nor model.

import MKABindings

/// One conversation; one stream of it at a time.
///
/// A stream ends its work when its task is cancelled, when it is cancelled or closed itself, or when nothing holds it any
/// more: leaving a loop over `send` itself is enough. The model chooses at most one more token, and what was generated is
/// kept as the turn's answer.
public final class Session: Sendable {
    private let native: NativeSession

    init(_ native: NativeSession) {
        self.native = native
    }

    /// User, agent and session.
    public var scope: Scope { native.scope() }

    /// Answers `message`: recalls what belongs to it, streams the answer, commits both.
    public func send(_ message: String, options: SendOptions = SendOptions()) -> EventStream<Event> {
        events { try native.send(message: message, options: options) }
    }

    /// Gives the model what the tools that its last answer called gave back, and answers.
    ///
    /// The results stand where the chat template has a place for them, or else in a message of the user's; each is a turn of
    /// role `.tool`. `system`, `tools`, `completion` and `joined` of `options` are ignored. Reading it throws
    /// `.invalidArgument` without a result, and where nothing was said yet.
    public func sendTool(_ results: [ToolResult], options: SendOptions = SendOptions()) -> EventStream<Event> {
        events { try native.sendTool(results: results, options: options) }
    }

    /// Gives the model what a tool gave back, and answers.
    public func sendTool(_ content: String, options: SendOptions = SendOptions()) -> EventStream<Event> {
        sendTool([ToolResult(content: content)], options: options)
    }

    /// Answers the last message again, in place of its answer, whose metadata the new one has.
    ///
    /// The prompt and the words that the answer begins with stay as they were: `system`, `tools`, `recallK`,
    /// `recallFilter`, `acrossSessions`, `answerPrefix`, `completion`, `joined` and `metadata` of `options` are ignored.
    /// Other words need a temperature and another seed.
    /// In a session that was opened again since, or behind an answer of more than eight pages of 64 tokens, the window is
    /// filled from the log: of what it does not hold, text is recalled and pages are not.
    /// Reading it throws `.notFound` where the last turn is no answer.
    public func regenerate(options: SendOptions = SendOptions()) -> EventStream<Event> {
        events { try native.regenerate(options: options) }
    }

    /// Takes every turn from `turn` on back, as if it had never been said: the next message follows what was before it.
    ///
    /// What is taken back stays in the log as retracted, keeps its number, and is not recalled. Throws `.notFound` if the log
    /// does not reach to `turn`.
    public func rewind(to turn: UInt64) async throws(MKAError) {
        try await translated { [native] in try await native.rewind(turn: turn) }
    }

    /// Begins `session`, of the same user and agent, which knows all that this one does and then goes its own way.
    ///
    /// Keys and values are shared, not copied. A turn from before the fork is one turn: forgetting it erases it in both.
    /// Throws `.invalidArgument` if `session` is taken, `.locked` while a stream of this session is open.
    public func fork(session: String) async throws(MKAError) -> Session {
        try await translated { [native] in Session(try await native.fork(name: session)) }
    }

    private func events(_ start: () throws -> NativeEvents) -> EventStream<Event> {
        EventStream {
            let events = try start()
            return Pull(
                number: events.number(), cancel: { events.cancel() }, close: { try await events.close() })
        }
    }

    /// Takes in a document of any length at constant memory.
    public func feed(_ text: String, options: FeedOptions = FeedOptions()) -> EventStream<FeedEvent> {
        progress { try native.feed(text: text, options: options) }
    }

    private func progress(_ start: () throws -> NativeFeed) -> EventStream<FeedEvent> {
        EventStream {
            let feed = try start()
            return Pull(number: feed.number(), cancel: { feed.cancel() }, close: { try await feed.close() })
        }
    }

    /// Takes in what was said elsewhere as if it had been said here: the model reads it and answers nothing.
    ///
    /// Roles are user and assistant; before a new session's first message may stand instructions, of role system.
    public func append(_ turns: [NewTurn]) -> EventStream<FeedEvent> {
        progress { try native.append(turns: turns.map(\.native)) }
    }

    /// Takes in something that the user said now, and answers nothing.
    public func append(_ text: String) -> EventStream<FeedEvent> {
        append([NewTurn(text)])
    }

    /// What memory holds on `query`, laid out for another model, never above the budget.
    ///
    /// Every session of the user is looked into, or of the agent if the session has one.
    public func context(
        _ query: String, budgetTokens: UInt64
    ) async throws(MKAError) -> Context {
        try await translated { [native] in
            try await native.context(query: query, budgetTokens: budgetTokens)
        }
    }

    /// Number of turns in the session's log.
    public var numTurns: UInt64 {
        get throws(MKAError) { try translated { try native.numTurns() } }
    }

    /// Tokens that the model has chosen for the answer begun last, those that wait to be read included.
    public var generatedTokens: UInt64 { native.generatedTokens() }

    /// Logits of the token after `text`, without changing the session.
    public func peekLogits(_ text: String) async throws(MKAError) -> [Float] {
        try await translated { [native] in try await native.peekLogits(text: text).rows.first ?? [] }
    }

    /// Gives the session back and cancels its stream; another handle may open it.
    public func close() {
        native.close()
    }
}
