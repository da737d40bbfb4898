package auth

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/push-manager/push-manager/engine"
)

// Method is a method of the push API that rights name.
type Method uint8

// target is what the ids of a method name.
type target uint8

const (
	nobody target = iota
	users
	rooms
)

// star is the pattern that every name matches.
const star = "*"

// The methods that rights name.
const (
	PushToRoom Method = iota
	PushToUser
	PushToUsers
	PushToRooms
	BroadcastMessage
	WatchReceipts
	ForgetUser
	Replay
	Explain
	Console // no method: what /console/ shows
	Disconnect
	DisconnectRoom // no method: Disconnect with a room_id
	CreateJob
	GetJob
	ListJobs
	WatchJob
	PauseJob
	ResumeJob
	CancelJob
	SetJobRate
	DeleteJob
	GetRoomMembers
	GetUsers
	WatchPresence
	WatchRoomPresence // no method: WatchPresence of a room
)

// methods says more of them.
var methods = [...]struct { //nolint:gochecknoglobals // a constant
	name   string
	target target
}{
	PushToRoom:       {"PushToRoom", rooms},
	PushToUser:       {"PushToUser", users},
	PushToUsers:      {"PushToUsers", users},
	PushToRooms:      {"PushToRooms", rooms},
	BroadcastMessage: {"BroadcastMessage", nobody},
	WatchReceipts:    {"WatchReceipts", nobody},
	ForgetUser:       {"ForgetUser", users},
	Replay:           {"Replay", users},
	Explain:          {"Explain", nobody},
	Console:          {"Console", nobody},
	Disconnect:       {"Disconnect", users},
	DisconnectRoom:   {"DisconnectRoom", rooms},
	CreateJob:        {"CreateJob", nobody}, // and the right to what it pushes
	GetJob:           {"GetJob", nobody},
	ListJobs:         {"ListJobs", nobody},
	WatchJob:         {"WatchJob", nobody},
	PauseJob:         {"PauseJob", nobody},
	ResumeJob:        {"ResumeJob", nobody},
	CancelJob:        {"CancelJob", nobody},
	SetJobRate:       {"SetJobRate", nobody},
	DeleteJob:        {"DeleteJob", nobody},
	GetRoomMembers:   {"GetRoomMembers", rooms},
	GetUsers:         {"GetUsers", users},
	WatchPresence:    {"WatchPresence", users},

	WatchRoomPresence: {"WatchRoomPresence", rooms},
}

// Methods are the names of all of them.
func Methods() []string {
	names := make([]string, len(methods))
	for i := range methods {
		names[i] = methods[i].name
	}
	return names
}

// MethodOf is the method of a name.
func MethodOf(name string) (m Method, known bool) {
	for i := range methods {
		if methods[i].name == name {
			return Method(i), true
		}
	}
	return 0, false
}

// String is the name of the method.
func (m Method) String() string { return methods[m].name }

// Target is what an id of the method names: "user", "room", or "" where the method takes none.
func (m Method) Target() string {
	switch methods[m].target {
	case users:
		return "user"
	case rooms:
		return "room"
	default:
		return ""
	}
}

// Limits are what one caller or tenant may use.
type Limits struct {
	Rate        int   // as Config.Rate of the push API; 0: the default of the process
	DailyPushes int64 // of a UTC day; 0: no bound
}

// TenantLimits are what all callers of a tenant may use together.
type TenantLimits struct {
	Limits

	MaxInFlight int // pushes that are not finished; 0: no bound
}

// Caller is who calls: an entry of a policy. It is immutable.
type Caller struct {
	Limits

	// Name is unique in the policy: the label of metrics and of the audit log, and what budgets are kept by. It has 1 to 64
	// letters, digits and ._- and is safe to print.
	Name string
	// Tenant is "" for a caller that belongs to none.
	Tenant string
	// TenantLimits are those of its tenant.
	TenantLimits TenantLimits
	// PriorityMax is the highest priority that the caller may claim.
	PriorityMax engine.Priority

	rules []rule
	may   uint64 // methods that any rule names, as bits
	all   uint64 // methods that a rule allows for every id, as bits
}

// rule allows methods for ids.
type rule struct {
	line         int
	methods      uint64 // as bits
	users, rooms patterns
}

func (r *rule) patterns(m Method) *patterns {
	if methods[m].target == rooms {
		return &r.rooms
	}
	return &r.users
}

// May tells whether the caller may call a method for any id at all.
func (c *Caller) May(m Method) bool { return c.may&(1<<m) != 0 }

// MayAny tells whether the caller may call a method for every id, so that none needs to be asked for.
func (c *Caller) MayAny(m Method) bool { return c.all&(1<<m) != 0 }

// Allows tells whether the caller may call a method for an id. The id is the caller's, without the prefix of its tenant.
func (c *Caller) Allows(m Method, id string) bool {
	if c.MayAny(m) {
		return true
	}
	for i := range c.rules {
		if r := &c.rules[i]; r.methods&(1<<m) != 0 {
			if _, ok := r.patterns(m).find(id); ok {
				return true
			}
		}
	}
	return false
}

// Explain is Allows, and tells the line of the first rule that allows it and the pattern in that rule. The pattern is
// empty for a method without ids.
func (c *Caller) Explain(m Method, id string) (line int, pattern string, allowed bool) {
	for i := range c.rules {
		r := &c.rules[i]
		if r.methods&(1<<m) == 0 {
			continue
		}
		if methods[m].target == nobody {
			return r.line, "", true
		}
		if pattern, ok := r.patterns(m).find(id); ok {
			return r.line, pattern.String(), true
		}
	}
	return 0, "", false
}

// seal computes what follows from the rules.
func (c *Caller) seal() {
	for i := range c.rules {
		r := &c.rules[i]
		c.may |= r.methods
		for m := range methods {
			if methods[m].target == nobody || r.patterns(Method(m)).any {
				c.all |= r.methods & (1 << m)
			}
		}
	}
}

// patterns are names, each exact or the begin of names. The zero value matches none.
type patterns struct {
	any      bool
	exact    map[string]struct{}
	prefixes []string // sorted, and none begins with another one: at most one is the begin of a name
}

// found is the pattern that a name matches.
type found struct {
	text string
	star bool // at its end
}

func (f found) String() string {
	if f.star {
		return f.text + star
	}
	return f.text
}

// newPatterns makes patterns of texts that checkPattern has found good.
func newPatterns(texts []string) patterns {
	p := patterns{exact: make(map[string]struct{})}
	var heads []string
	for _, text := range texts {
		switch head, isPrefix := strings.CutSuffix(text, star); {
		case text == star:
			p.any = true
		case isPrefix:
			heads = append(heads, head)
		default:
			p.exact[text] = struct{}{}
		}
	}
	slices.Sort(heads)
	for _, head := range heads {
		if last := len(p.prefixes) - 1; last < 0 || !strings.HasPrefix(head, p.prefixes[last]) {
			p.prefixes = append(p.prefixes, head)
		}
	}
	return p
}

// find is the pattern that a name matches. Of the prefixes only the last one that is not behind the name can be its
// begin: what stands between the two begins with it, too, and has been left out.
func (p *patterns) find(name string) (found, bool) {
	if p.any {
		return found{star: true}, true
	}
	if _, ok := p.exact[name]; ok {
		return found{text: name}, true
	}
	i, exact := slices.BinarySearch(p.prefixes, name)
	if !exact {
		i--
	}
	if i >= 0 && strings.HasPrefix(name, p.prefixes[i]) {
		return found{text: p.prefixes[i], star: true}, true
	}
	return found{}, false
}

// checkPattern refuses a star that is not at the end.
func checkPattern(text string) error {
	switch {
	case text == "":
		return errors.New("must not be empty")
	case len(text) > maxPattern:
		return fmt.Errorf("has %d bytes, more than %d", len(text), maxPattern)
	case strings.Contains(strings.TrimSuffix(text, star), star):
		return fmt.Errorf("%q has a star that is not its end", text)
	}
	return nil
}

// Policy is the content of a policy file. It is immutable.
type Policy struct {
	callers   map[string]*Caller // by name
	byName    map[string]*Caller // by a name in certificates
	byKey     map[string]*Caller // by the id of an API key
	bySubject map[subject]*Caller
	tenants   map[string]TenantLimits
}

// subject is who a token is about.
type subject struct{ issuer, name string }

// Caller is the caller of a name, nil for none.
func (p *Policy) Caller(name string) *Caller { return p.callers[name] }

// Tenants tells whether any are configured.
func (p *Policy) Tenants() bool { return len(p.tenants) > 0 }

// DailyPushes are the quotas of tenants and of callers, by name.
func (p *Policy) DailyPushes() (tenants, callers map[string]int64) {
	tenants, callers = map[string]int64{}, map[string]int64{}
	for name, limits := range p.tenants {
		if limits.DailyPushes > 0 {
			tenants[name] = limits.DailyPushes
		}
	}
	for name, c := range p.callers {
		if c.DailyPushes > 0 {
			callers[name] = c.DailyPushes
		}
	}
	return tenants, callers
}

// OfKey is the caller of an API key, nil for none.
func (p *Policy) OfKey(id string) *Caller { return p.byKey[id] }

// OfToken is the caller that a token of an issuer is about, nil for none.
func (p *Policy) OfToken(issuer, name string) *Caller { return p.bySubject[subject{issuer, name}] }

// OfNames is the caller of a certificate with these names, and the name that it was found by. A certificate whose names
// belong to several callers is nobody's.
func (p *Policy) OfNames(names []string) (c *Caller, name string) {
	for _, n := range names {
		switch of := p.byName[n]; {
		case of == nil || of == c:
		case c != nil:
			return nil, ""
		default:
			c, name = of, n
		}
	}
	return c, name
}
