// Owns the times of options and values as dates, beside the library's milliseconds.
// Knows no call.

import Foundation

extension Date {
    /// Of milliseconds since 1970, the library's clock.
    public init(milliseconds: Int64) {
        self.init(timeIntervalSince1970: Double(milliseconds) / 1000)
    }

    /// Milliseconds since 1970, the library's clock; the first or the last of them for a date that is beyond.
    public var milliseconds: Int64 {
        let exact = (timeIntervalSince1970 * 1000).rounded()
        return Int64(exactly: exact) ?? (exact < 0 ? .min : .max)
    }
}

extension SendOptions {
    /// When the message was said; now if left out.
    public var time: Date? {
        get { timeMs.map { Date(milliseconds: $0) } }
        set { timeMs = newValue?.milliseconds }
    }
}

extension FeedOptions {
    /// When the document was given; now if left out.
    public var time: Date? {
        get { timeMs.map { Date(milliseconds: $0) } }
        set { timeMs = newValue?.milliseconds }
    }
}

extension RecallOptions {
    /// Only turns at this time or later.
    public var since: Date? {
        get { sinceMs.map { Date(milliseconds: $0) } }
        set { sinceMs = newValue?.milliseconds }
    }

    /// Only turns before this time.
    public var until: Date? {
        get { untilMs.map { Date(milliseconds: $0) } }
        set { untilMs = newValue?.milliseconds }
    }

    /// Memory as it was at this time: later turns are not there yet, and a turn counts as superseded or expired if it was by
    /// then.
    public var asOf: Date? {
        get { asOfMs.map { Date(milliseconds: $0) } }
        set { asOfMs = newValue?.milliseconds }
    }

    /// The caller's clock: what expired by then is left out; the system's clock if left out.
    public var now: Date? {
        get { nowMs.map { Date(milliseconds: $0) } }
        set { nowMs = newValue?.milliseconds }
    }
}

extension Source {
    /// When it was said.
    public var time: Date {
        get { Date(milliseconds: timeMs) }
        set { timeMs = newValue.milliseconds }
    }

    /// When the turn stops being recalled.
    public var expires: Date? {
        get { expiresMs.map { Date(milliseconds: $0) } }
        set { expiresMs = newValue?.milliseconds }
    }
}

extension Turn {
    /// When it was said.
    public var time: Date {
        get { Date(milliseconds: timeMs) }
        set { timeMs = newValue.milliseconds }
    }

    /// When it stops being recalled.
    public var expires: Date? {
        get { expiresMs.map { Date(milliseconds: $0) } }
        set { expiresMs = newValue?.milliseconds }
    }
}

extension SessionInfo {
    /// Time of its latest turn.
    public var lastTime: Date? {
        get { lastTimeMs.map { Date(milliseconds: $0) } }
        set { lastTimeMs = newValue?.milliseconds }
    }
}
