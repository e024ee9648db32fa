//! Records in the host's journal, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).

use std::os::unix::net::UnixDatagram;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Of one value: a datagram must stay small enough to be sent in one piece.
const LONGEST: usize = 4096;

/// Sends it where there is a journal that takes it; one that is not there, or is busy, keeps nobody up.
pub fn send(fields: &[(&str, String)]) {
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true).and_then(|()| socket.send_to(&datagram(fields), SOCKET));
    }
}

/// Values with line breaks go with their length, so that none can look like another field.
fn datagram(fields: &[(&str, String)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
        let value = &value.as_bytes()[..value.len().min(LONGEST)];
        bytes.extend(name.as_bytes());
        if value.contains(&b'\n') {
            bytes.push(b'\n');
            bytes.extend((value.len() as u64).to_le_bytes());
        } else {
            bytes.push(b'=');
        }
        bytes.extend(value);
        bytes.push(b'\n');
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_forge_a_field() {
        let fields =
            [("MESSAGE", "x".to_owned()), ("ZD_REASON", "a\nZD_BY=root".into()), ("ZD_TTY", String::new())];
        assert_eq!(datagram(&fields), b"MESSAGE=x\nZD_REASON\n\x0c\0\0\0\0\0\0\0a\nZD_BY=root\n");
        assert_eq!(datagram(&[("A", "ä".repeat(4096))]).len(), "A=\n".len() + LONGEST);
    }
}
