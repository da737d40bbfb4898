package ingress

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
)

// scopedKeep is the largest buffer of a tenant's ids that a call keeps: that of a room, of a user, of a
// short list.
const scopedKeep = 1 << 10

// scopeBytes is the length of scopeOf.
func scopeBytes(tenant string) int {
	if tenant == "" {
		return 0
	}
	return len(tenant) + 1
}

// scopeOf is what stands before each id of a tenant.
func scopeOf(tenant string) string {
	if tenant == "" {
		return ""
	}
	return tenant + string(ids.Separator)
}

// enterTenant puts the tenant of the caller, if it has one, before all ids of a push that has been decoded
// and allowed. From here to the reply nobody sees the caller's own ids; what they must be is checked by the
// engine, which knows what stands before them. They live in one buffer, which the call uses again.
func (c *call) enterTenant() {
	tenant := c.tenant
	if tenant == "" {
		return
	}
	scope := scopeBytes(tenant)
	p, size := &c.push, scope
	all := [...][]string{p.Users, p.Exclude}
	for _, list := range all {
		for _, id := range list {
			size += scope + len(id)
		}
	}
	switch p.Kind {
	case engine.ToRoom:
		size += scope + len(p.Room)
	case engine.ToUser:
		size += scope + len(p.User)
	case engine.ToUsers, engine.ToRooms, engine.ToAll: // lists, or nobody
	}
	b := c.scoped[:0]
	if size > cap(b) {
		b = make([]byte, 0, size) // never grows: the ids are parts of it
	}
	if c.scoped = nil; cap(b) <= scopedKeep {
		c.scoped = b
	}
	scoped := func(id string) string {
		start := len(b)
		b = append(append(append(b, tenant...), ids.Separator), id...)
		return wire.String(b[start:])
	}
	p.Scope = scoped("")
	switch p.Kind {
	case engine.ToRoom:
		p.Room = scoped(p.Room)
	case engine.ToUser:
		p.User = scoped(p.User)
	case engine.ToUsers, engine.ToRooms, engine.ToAll:
	}
	if p.Rooms != nil {
		p.Rooms = p.Rooms.Scoped(p.Scope)
	}
	for _, list := range all {
		for i, id := range list {
			list[i] = scoped(id)
		}
	}
}

// shown is an id of a push as its caller knows it.
func shown(id string, p *engine.Push) string { return strings.TrimPrefix(id, p.Scope) }

// reasonOf is what the caller is told of a failure. The words of a node may name ids.
func reasonOf(f *engine.NodeFailure, scope string) string {
	text := f.Reason
	if scope != "" {
		text = unscoped(text, scope)
	}
	return plain.Line(text, maxReason)
}

// unscoped takes the scope out of a text, wherever an id may begin.
func unscoped(text, scope string) string {
	var b strings.Builder
	for rest := text; ; {
		i := strings.Index(rest, scope)
		if i < 0 {
			b.WriteString(rest)
			return b.String()
		}
		before := rest[:i]
		b.WriteString(before)
		if last, _ := utf8.DecodeLastRuneInString(before); unicode.IsLetter(last) || unicode.IsDigit(last) || last == '-' {
			b.WriteString(scope) // the end of another word
		}
		rest = rest[i+len(scope):]
	}
}
