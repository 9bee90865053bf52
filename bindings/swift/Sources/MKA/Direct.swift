// Owns the plain calls of the library that a stream makes for every token, and who is told when there is more to ask for.
// Knows no event: what the bytes mean is in Packed.swift.

import CMKA
import Foundation

/// Tasks that wait for a stream. The library rings from its own threads.
final class Waiting: @unchecked Sendable {
    private let lock = NSLock()
    /// Whether there may be something to ask for, or the end was seen; guarded by `lock`.
    private var rung = false
    private var ended = false
    private var tasks: [UnsafeContinuation<Void, Never>] = []

    /// What rings from now on is not to be missed; called before the library is asked.
    func arm() {
        lock.withLock { rung = ended }
    }

    func ring(ends: Bool = false) {
        let waking = lock.withLock {
            rung = true
            ended = ended || ends
            defer { tasks = [] }
            return tasks
        }
        for task in waking { task.resume() }
    }

    /// Until it is rung, at once if it was since `arm`.
    func wait() async {
        await withUnsafeContinuation { task in
            let now = lock.withLock {
                if !rung { tasks.append(task) }
                return rung
            }
            if now { task.resume() }
        }
    }

    /// For one call of the library, which gives the reference back.
    fileprivate var caller: MKACaller {
        MKACaller(
            context: Unmanaged.passRetained(self).toOpaque(),
            wake: { Unmanaged<Waiting>.fromOpaque($0).takeUnretainedValue().ring() },
            release: { Unmanaged<Waiting>.fromOpaque($0).release() })
    }
}

enum Direct {
    /// What `read` makes of the bytes that are ready in stream `number`, without bytes if none are yet, and then `waiting` is
    /// rung; nil at the end.
    static func poll<T>(
        _ number: UInt64, _ waiting: Waiting, _ read: (UnsafeRawBufferPointer) throws -> T
    ) throws -> T? {
        var reply = MKAReply()
        mka_direct_poll_for(number, waiting.caller, &reply)
        defer { mka_direct_free(reply.data, reply.len) }
        let bytes = UnsafeRawBufferPointer(start: reply.data, count: reply.data == nil ? 0 : reply.len)
        switch reply.code {
        case 0: return try read(bytes)
        case 1: return nil
        default: throw MKAError(packed: bytes)
        }
    }
}

extension MKAError {
    /// Of its kind, a zero byte and its text.
    fileprivate init(packed bytes: UnsafeRawBufferPointer) {
        let parts = bytes.split(separator: 0, maxSplits: 1).map { String(decoding: $0, as: UTF8.self) }
        self.init(Kind(named: parts.first ?? ""), parts.count > 1 ? parts[1] : "")
    }
}
