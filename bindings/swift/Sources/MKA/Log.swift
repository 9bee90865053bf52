// Owns what the library logs, handed to a closure.
// Knows no logger.

import MKABindings

/// How grave a message is.
public typealias LogLevel = MKABindings.LogLevel

private final class Sink: LogSink {
    private let handler: @Sendable (LogLevel, String, String) -> Void

    init(_ handler: @escaping @Sendable (LogLevel, String, String) -> Void) {
        self.handler = handler
    }

    func log(level: LogLevel, target: String, message: String) {
        handler(level, target, message)
    }
}

/// Sends what the library logs at `level` and graver to `handler`, called from the library's threads with level, place
/// and message; nil sends it to nobody.
public func forwardLogs(
    level: LogLevel = .info, to handler: (@Sendable (LogLevel, String, String) -> Void)?
) throws(MKAError) {
    try translated { try MKABindings.forwardLogs(level: level, sink: handler.map(Sink.init)) }
}
