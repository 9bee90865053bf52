// Owns the stream that a session gives: events to be read, and how their work is stopped.
// Knows no call of the library; Pull.swift does.

import Foundation

/// The events of a turn, or the progress of what is taken in, to be read with `for try await` by one task at a time.
///
/// Its work ends when the task that reads is cancelled, by ``cancel()`` or ``close()``, and when nothing holds the stream any
/// more: leaving a loop over ``Session/send(_:options:)`` itself is enough, a stream in a constant is held as long as that.
public struct EventStream<Element: Sendable>: AsyncSequence, Sendable {
    fileprivate enum Source: Sendable {
        case pull(Pull<Element>)
        case failed(Refusal)
    }

    private let source: Source

    /// Over what `make` begins; an error of it is thrown to whoever reads.
    init(_ make: () throws -> Pull<Element>) {
        do {
            source = .pull(try make())
        } catch {
            source = .failed(Refusal(MKAError(error)))
        }
    }

    /// Reads the events of a stream.
    public struct AsyncIterator: AsyncIteratorProtocol, Sendable {
        fileprivate let source: Source

        /// The next event; nil after the last.
        public func next() async throws -> Element? {
            switch source {
            case .pull(let pull): return try await pull.next()
            case .failed(let failure): throw failure.read()
            }
        }
    }

    /// What reads the events; two of one stream share them.
    public func makeAsyncIterator() -> AsyncIterator {
        AsyncIterator(source: source)
    }

    /// Stops the work within one token, or at the next block, from any task; whoever reads sees what was on its way, then the
    /// end.
    public func cancel() {
        if case .pull(let pull) = source { pull.cancel() }
    }

    /// Stops the work and waits until the session stands at what was done; throws an error of the work that was not read.
    public func close() async throws(MKAError) {
        switch source {
        case .pull(let pull): try await translated { try await pull.close() }
        case .failed(let failure): if let error = failure.taken() { throw error }
        }
    }
}

/// Why a stream never began, and whether somebody was told: whoever closes is told only if nobody was.
private final class Refusal: @unchecked Sendable {
    private let error: MKAError
    private let lock = NSLock()
    /// Guarded by `lock`.
    private var isTold = false

    init(_ error: MKAError) {
        self.error = error
    }

    /// The error, for a reader, each time.
    func read() -> MKAError {
        lock.withLock { isTold = true }
        return error
    }

    /// The error, unless somebody was told.
    func taken() -> MKAError? {
        lock.withLock {
            defer { isTold = true }
            return isTold ? nil : error
        }
    }
}

extension EventStream where Element == Event {
    /// Runs the turn to its end: the whole answer as it was streamed, which is without `answerPrefix`, and its cost.
    public func text() async throws -> (text: String, usage: Usage) {
        var answer = ""
        for try await event in self {
            switch event {
            case .token(let token): answer += token.text
            case .done(let usage): return (answer, usage)
            case .recalled: break
            }
        }
        throw MKAError(.cancelled, "send: cancelled before the turn was done")
    }
}

extension EventStream where Element == FeedEvent {
    /// Feeds to the end.
    public func finish() async throws -> FeedSummary {
        for try await event in self {
            if case .done(let summary) = event { return summary }
        }
        throw MKAError(.cancelled, "feed: cancelled before the document was done")
    }
}
