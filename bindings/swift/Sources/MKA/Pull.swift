// Owns the bridge from the library's batches to AsyncThrowingStream, and how a task that is cancelled reaches the library.
// Knows no event.

import Foundation

/// A stream of the library: the events that came with the last batch and were not asked for yet.
final class Pull<Element: Sendable>: @unchecked Sendable {
    private let batch: @Sendable () async throws -> [Element]?
    private let cancel: @Sendable () -> Void
    private let lock = NSLock()
    /// The last batch, and how much of it was handed out; guarded by `lock`.
    private var ready: [Element] = []
    private var taken = 0

    init(
        batch: @escaping @Sendable () async throws -> [Element]?,
        cancel: @escaping @Sendable () -> Void
    ) {
        self.batch = batch
        self.cancel = cancel
    }

    deinit {
        cancel()
    }

    private func take() -> Element? {
        lock.withLock {
            guard taken < ready.count else { return nil }
            taken += 1
            return ready[taken - 1]
        }
    }

    private func put(_ events: [Element]) {
        lock.withLock {
            ready.removeFirst(taken)
            ready.append(contentsOf: events)
            taken = 0
        }
    }

    func next() async throws -> Element? {
        while true {
            if let element = take() { return element }
            let events: [Element]?
            do {
                events = try await withTaskCancellationHandler {
                    try await batch()
                } onCancel: {
                    cancel()
                }
            } catch {
                throw MKAError(error)
            }
            guard let events else {
                try Task.checkCancellation()
                return nil
            }
            put(events)
        }
    }

    /// The stream; dropping it, or leaving the loop that holds it, cancels the work.
    static func stream(_ make: () throws -> Pull) -> AsyncThrowingStream<Element, any Error> {
        do {
            let pull = try make()
            return AsyncThrowingStream { try await pull.next() }
        } catch {
            let failure = MKAError(error)
            return AsyncThrowingStream { throw failure }
        }
    }
}
