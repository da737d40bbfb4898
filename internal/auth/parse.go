package auth

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/ids"
)

// Bounds of a policy file. Each is far above what a person keeps in a file.
const (
	maxPolicyFile = 1 << 20
	maxTenants    = 10_000
	maxCallers    = 10_000
	maxMatches    = 64 // of one caller
	maxRules      = 64 // of one caller
	maxPatterns   = 1_000
	maxPattern    = 4096 // bytes: as long as an id may be configured to be
	maxName       = 64
	maxText       = 2048 // bytes of a name in a certificate, an issuer, a subject
)

// policyVersion is the only one there is.
const policyVersion = "1"

// ParsePolicy reads a policy file. Its error names the line and the field, in one line of text.
func ParsePolicy(text []byte) (p *Policy, err error) {
	defer func() {
		if v := recover(); v != nil { // of the library, on a text that nobody has thought of
			p, err = nil, fmt.Errorf("is not understood: %.100q", fmt.Sprint(v))
		}
	}()
	if len(text) > maxPolicyFile {
		return nil, fmt.Errorf("has %d bytes, more than %d", len(text), maxPolicyFile)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var doc, more yaml.Node
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0:
		return nil, errors.New("holds nothing")
	case err != nil:
		return nil, syntaxError(err)
	}
	switch err := decoder.Decode(&more); {
	case err == nil:
		return nil, errors.New("has more than one YAML document")
	case !errors.Is(err, io.EOF):
		return nil, syntaxError(err)
	}
	r := reader{policy: &Policy{
		callers: map[string]*Caller{}, byName: map[string]*Caller{}, byKey: map[string]*Caller{},
		bySubject: map[subject]*Caller{}, tenants: map[string]TenantLimits{},
	}}
	if err := r.read(node{doc.Content[0], ""}); err != nil {
		return nil, err
	}
	return r.policy, nil
}

// syntaxError is the first line of what the YAML parser says, which names the line of the file.
func syntaxError(err error) error {
	line, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), "yaml: "), "\n")
	return fmt.Errorf("%.300s", line)
}

// reader fills a policy from nodes.
type reader struct{ policy *Policy }

func (r *reader) read(root node) error {
	fields, err := root.fields("version", "tenants", "callers")
	if err != nil {
		return err
	}
	version, ok := fields["version"]
	if !ok {
		return root.errorf("version is missing, want version: %s", policyVersion)
	}
	if text, err := version.text(maxText); err != nil || text != policyVersion {
		return version.errorf("must be %s", policyVersion)
	}
	if tenants, ok := fields["tenants"]; ok {
		if err := r.readTenants(tenants); err != nil {
			return err
		}
	}
	callers, ok := fields["callers"]
	if !ok {
		return root.errorf("callers is missing: nobody could call")
	}
	list, err := callers.list(maxCallers)
	if err != nil {
		return err
	}
	for _, c := range list {
		if err := r.readCaller(c); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) readTenants(n node) error {
	entries, err := n.entries()
	switch {
	case err != nil:
		return err
	case len(entries) > maxTenants:
		return n.errorf("has %d entries, more than %d", len(entries), maxTenants)
	}
	for _, e := range entries {
		if err := CheckTenant(e.name); err != nil {
			return e.key.errorf("%v", err)
		}
		var t TenantLimits
		if !e.value.null() { // a tenant without limits
			fields, err := e.value.fields("rate", "daily_pushes", "max_in_flight")
			if err != nil {
				return err
			}
			if t.Limits, err = readLimits(fields); err != nil {
				return err
			}
			inFlight, err := fields.integer("max_in_flight", 1<<24)
			if err != nil {
				return err
			}
			t.MaxInFlight = int(inFlight)
		}
		r.policy.tenants[e.name] = t
	}
	return nil
}

func readLimits(fields fields) (l Limits, err error) {
	rate, err := fields.integer("rate", 1<<30)
	if err != nil {
		return l, err
	}
	l.Rate = int(rate)
	l.DailyPushes, err = fields.integer("daily_pushes", math.MaxInt64)
	return l, err
}

func (r *reader) readCaller(n node) error {
	fields, err := n.fields("name", "tenant", "match", "allow", "priority_max", "rate", "daily_pushes")
	if err != nil {
		return err
	}
	c := &Caller{PriorityMax: engine.Critical}
	if err := r.readName(c, n, fields); err != nil {
		return err
	}
	if err := r.readTenant(c, n, fields); err != nil {
		return err
	}
	if c.Limits, err = readLimits(fields); err != nil {
		return err
	}
	if p, ok := fields["priority_max"]; ok {
		text, err := p.text(maxText)
		if err != nil {
			return err
		}
		if c.PriorityMax, ok = engine.ParsePriority(text); !ok {
			return p.errorf("%q is none of low, normal, high, critical", text)
		}
	}
	matches, err := fields.list(n, "match", maxMatches)
	if err != nil {
		return err
	}
	for _, m := range matches {
		if err := r.readMatch(c, m); err != nil {
			return err
		}
	}
	rules, err := fields.list(n, "allow", maxRules)
	if err != nil {
		return err
	}
	for _, rule := range rules {
		if err := readRule(c, rule); err != nil {
			return err
		}
	}
	c.seal()
	return nil
}

func (r *reader) readName(c *Caller, n node, fields fields) (err error) {
	name, ok := fields["name"]
	if !ok {
		return n.errorf("name is missing")
	}
	if c.Name, err = name.text(maxName); err != nil {
		return err
	}
	if strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return name.errorf("%q must have letters, digits and ._- only", c.Name)
	}
	if r.policy.callers[c.Name] != nil {
		return name.errorf("%q is the name of another caller, too", c.Name)
	}
	r.policy.callers[c.Name] = c
	return nil
}

// readTenant sees to it that nobody is without a tenant by mistake: such a caller reaches the ids of all tenants.
func (r *reader) readTenant(c *Caller, n node, fields fields) (err error) {
	tenant, ok := fields["tenant"]
	if !ok {
		if r.policy.Tenants() {
			return n.errorf(`caller %q has no tenant: name one, or say tenant: "*" for a caller that reaches the ids of all tenants`, c.Name)
		}
		return nil
	}
	text, err := tenant.text(maxText)
	if err != nil || text == star {
		return err
	}
	if c.TenantLimits, ok = r.policy.tenants[text]; !ok {
		return tenant.errorf("there is no tenant %q", text)
	}
	c.Tenant = text
	return nil
}

// readMatch notes a credential of a caller.
func (r *reader) readMatch(c *Caller, n node) error {
	fields, err := n.fields("san", "jwt", "key")
	if err != nil {
		return err
	}
	if len(fields) != 1 {
		return n.errorf("must have one of san, jwt and key")
	}
	taken := func(n node, other *Caller) error {
		if other == nil {
			return nil
		}
		return n.errorf("this credential of %q is one of %q already", c.Name, other.Name)
	}
	if san, ok := fields["san"]; ok {
		text, err := san.text(maxText)
		if err != nil {
			return err
		}
		if err := certs.CheckName(text); err != nil {
			return san.errorf("%v", err)
		}
		if err := taken(san, r.policy.byName[text]); err != nil {
			return err
		}
		r.policy.byName[text] = c
	}
	if key, ok := fields["key"]; ok {
		text, err := key.text(maxText)
		if err != nil {
			return err
		}
		if !apikey.IsID(text) { // it may be a whole key, which is not to be shown
			return key.errorf("must be the id of an API key: the 8 letters and digits behind %s", apikey.Prefix)
		}
		if err := taken(key, r.policy.byKey[text]); err != nil {
			return err
		}
		r.policy.byKey[text] = c
	}
	if jwt, ok := fields["jwt"]; ok {
		claims, err := jwt.fields("issuer", "subject")
		if err != nil {
			return err
		}
		issuer, err := claims.text(jwt, "issuer", maxText)
		if err != nil {
			return err
		}
		name, err := claims.text(jwt, "subject", maxText)
		if err != nil {
			return err
		}
		if err := taken(jwt, r.policy.bySubject[subject{issuer, name}]); err != nil {
			return err
		}
		r.policy.bySubject[subject{issuer, name}] = c
	}
	return nil
}

func readRule(c *Caller, n node) error {
	fields, err := n.fields("methods", "users", "rooms")
	if err != nil {
		return err
	}
	names, err := fields.list(n, "methods", len(methods)+1)
	if err != nil {
		return err
	}
	given := rule{line: n.Line}
	var needs [3]string // the method that needs a target
	for _, name := range names {
		text, err := name.text(maxText)
		if err != nil {
			return err
		}
		if text == star {
			given.methods |= 1<<len(methods) - 1
			continue
		}
		if text == Console.String() && c.Tenant != "" {
			return name.errorf("Console is not for callers of a tenant: it shows what is of all of them")
		}
		m, known := MethodOf(text)
		if !known {
			return name.errorf("%q is no method", text)
		}
		given.methods |= 1 << m
		needs[methods[m].target] = text
	}
	everything := given.methods == 1<<len(methods)-1
	if c.Tenant != "" {
		given.methods &^= 1 << Console
	}
	for _, t := range []struct {
		field string
		kind  target
		into  *patterns
	}{{"users", users, &given.users}, {"rooms", rooms, &given.rooms}} {
		list, ok := fields[t.field]
		switch {
		case !ok && needs[t.kind] != "":
			return n.errorf("%s is missing: without it %s is allowed for nobody", t.field, needs[t.kind])
		case !ok:
			continue
		case needs[t.kind] == "" && !everything:
			return list.errorf("none of the methods takes %s", t.field)
		}
		if *t.into, err = readPatterns(list); err != nil {
			return err
		}
	}
	c.rules = append(c.rules, given)
	return nil
}

func readPatterns(n node) (p patterns, err error) {
	list, err := n.list(maxPatterns)
	if err != nil {
		return p, err
	}
	texts := make([]string, len(list))
	for i, item := range list {
		if texts[i], err = item.text(maxPattern + 1); err != nil {
			return p, err
		}
		if err := checkPattern(texts[i]); err != nil {
			return p, item.errorf("%v", err)
		}
	}
	return newPatterns(texts), nil
}

// CheckTenant refuses what cannot be the name of a tenant. It has no slash, which is what ends it before an id.
func CheckTenant(name string) error {
	if err := ids.CheckTenant(name); err != nil {
		return fmt.Errorf("%.64q is no tenant: %w", name, err)
	}
	return nil
}

// node is a place in a YAML file, and the way to it.
type node struct {
	*yaml.Node

	path string
}

func (n node) errorf(format string, args ...any) error {
	at := "line " + strconv.Itoa(n.Line) + ": "
	if n.path != "" {
		at += n.path + ": "
	}
	return errors.New(at + fmt.Sprintf(format, args...))
}

// plain refuses what a list of rights has no use for, and what could make a small file large.
func (n node) plain() error {
	switch {
	case n.Anchor != "" || n.Kind == yaml.AliasNode:
		return n.errorf("YAML anchors are not understood")
	case n.Style&yaml.TaggedStyle != 0:
		return n.errorf("YAML tags are not understood")
	}
	return nil
}

func (n node) null() bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" && n.Anchor == "" }

// text is a text of 1 to most bytes.
func (n node) text(most int) (string, error) {
	if err := n.plain(); err != nil {
		return "", err
	}
	switch {
	case n.Kind != yaml.ScalarNode:
		return "", n.errorf("must be a text")
	case n.null() || n.Value == "":
		return "", n.errorf("must not be empty")
	case len(n.Value) > most:
		return "", n.errorf("has %d bytes, more than %d", len(n.Value), most)
	}
	return n.Value, nil
}

// list is a list of 1 to most items.
func (n node) list(most int) ([]node, error) {
	if err := n.plain(); err != nil {
		return nil, err
	}
	switch {
	case n.Kind != yaml.SequenceNode:
		return nil, n.errorf("must be a list")
	case len(n.Content) == 0:
		return nil, n.errorf("must not be empty")
	case len(n.Content) > most:
		return nil, n.errorf("has %d entries, more than %d", len(n.Content), most)
	}
	items := make([]node, len(n.Content))
	for i, item := range n.Content {
		items[i] = node{item, n.path + "[" + strconv.Itoa(i) + "]"}
	}
	return items, nil
}

// entry is a key of a mapping with its value.
type entry struct {
	name       string
	key, value node
}

// entries are those of a mapping, each once.
func (n node) entries() ([]entry, error) {
	if err := n.plain(); err != nil {
		return nil, err
	}
	if n.Kind != yaml.MappingNode {
		return nil, n.errorf("must have keys and values")
	}
	seen := make(map[string]bool, len(n.Content)/2)
	list := make([]entry, 0, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := node{n.Content[i], n.path}
		name, err := key.text(maxText)
		if err != nil {
			return nil, err
		}
		if seen[name] {
			return nil, key.errorf("%.64q stands here twice", name)
		}
		seen[name] = true
		path := name
		if n.path != "" {
			path = n.path + "." + name
		}
		list = append(list, entry{name, key, node{n.Content[i+1], path}})
	}
	return list, nil
}

// fields are the values of a mapping with known keys.
type fields map[string]node

// fields are those of a mapping that has no other keys.
func (n node) fields(known ...string) (fields, error) {
	entries, err := n.entries()
	if err != nil {
		return nil, err
	}
	all := make(fields, len(entries))
	for _, e := range entries {
		if !slices.Contains(known, e.name) {
			return nil, e.key.errorf("unknown key %.64q, want one of %s", e.name, strings.Join(known, ", "))
		}
		all[e.name] = e.value
	}
	return all, nil
}

// list is a field that must be there, of 1 to most items.
func (f fields) list(of node, name string, most int) ([]node, error) {
	n, ok := f[name]
	if !ok {
		return nil, of.errorf("%s is missing", name)
	}
	return n.list(most)
}

// text is a field that must be there.
func (f fields) text(of node, name string, most int) (string, error) {
	n, ok := f[name]
	if !ok {
		return "", of.errorf("%s is missing", name)
	}
	return n.text(most)
}

// integer is a field between 0 and most, 0 if it is not there.
func (f fields) integer(name string, most int64) (int64, error) {
	n, ok := f[name]
	if !ok {
		return 0, nil
	}
	text, err := n.text(maxText)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(text, 10, 64)
	if err != nil || v < 0 || v > most {
		return 0, n.errorf("%.64q is no whole number from 0 to %d", text, most)
	}
	return v, nil
}
