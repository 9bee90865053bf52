// Owns the bridge from the library's batches to single events, and how a task that is cancelled reaches the library.
// Knows no event.

import Foundation

/// A stream of the library: the events that came with the last batch and were not asked for yet.
final class Pull<Element: Sendable>: @unchecked Sendable {
    private let number: UInt64
    private let cancelling: @Sendable () -> Void
    private let closing: @Sendable () async throws -> Void
    private let read: (inout Packed) throws -> Element
    private let waiting = Waiting()
    private let lock = NSLock()
    /// The last batch, and how much of it was handed out; guarded by `lock`.
    private var ready: [Element] = []
    private var taken = 0

    /// `number` is that of a stream which `cancel` keeps open.
    init(
        number: UInt64, cancel: @escaping @Sendable () -> Void,
        close: @escaping @Sendable () async throws -> Void
    ) where Element: Unpacked {
        self.number = number
        self.cancelling = cancel
        self.closing = close
        self.read = { bytes in try Element.next(from: &bytes) }
    }

    deinit {
        cancelling()
    }

    /// Stops the work; whoever reads sees what was on its way, then the end.
    func cancel() {
        cancelling()
    }

    /// Stops the work and waits for its end; what was on its way is dropped.
    func close() async throws {
        dropReady()
        try await closing()
    }

    private func dropReady() {
        lock.withLock {
            ready = []
            taken = 0
        }
    }

    private enum Polled {
        case element(Element)
        case nothing
        case end
    }

    private func poll() throws -> Polled {
        try lock.withLock {
            if taken == ready.count {
                waiting.arm()
                ready.removeAll(keepingCapacity: true)
                taken = 0
                let more: Void? = try Direct.poll(number, waiting) { bytes in
                    var bytes = Packed(bytes)
                    while !bytes.isEmpty { ready.append(try read(&bytes)) }
                }
                if more == nil { return .end }
                if ready.isEmpty { return .nothing }
            }
            taken += 1
            return .element(ready[taken - 1])
        }
    }

    func next() async throws -> Element? {
        do {
            while true {
                // A task that never has to wait is not told of its end in another way.
                if Task.isCancelled { cancel() }
                switch try poll() {
                case .element(let element): return element
                case .nothing:
                    await withTaskCancellationHandler {
                        await waiting.wait()
                    } onCancel: {
                        cancel()
                    }
                case .end:
                    waiting.ring(ends: true)
                    try Task.checkCancellation()
                    return nil
                }
            }
        } catch let error as CancellationError {
            throw error
        } catch {
            // Whoever else waits sees the end.
            waiting.ring(ends: true)
            throw MKAError(error)
        }
    }
}
